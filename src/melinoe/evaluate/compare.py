"""Compare two models on the same examples: their paired difference, and a sentence on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from melinoe.errors import DataError
from melinoe.evaluate.perplexity import Floats, Perplexity, perplexity_increase
from melinoe.stats import Estimate, paired_difference, paired_ratio

Rate = tuple[Sequence[float], Sequence[float]]  # numerators and denominators, one per example


@dataclass(frozen=True)
class Comparison:
    """
    The difference of *model* from *other* in one metric of one text (*domain*), paired.

    *change* is the model's value minus the other's, or with *relative* over it, minus 1.
    """

    metric: str
    domain: str
    model: str
    other: str
    change: Estimate
    relative: bool
    lower_is_better: bool

    @property
    def better(self) -> str | None:
        """The better model; ``None`` where the interval holds no difference, or n is 1."""
        if self.change.n < 2 or self.change.low <= 0 <= self.change.high:
            return None
        return self.model if (self.change.mean < 0) is self.lower_is_better else self.other

    @property
    def sentence(self) -> str:
        """A sentence on how the two differ, and which is better or that none is shown to be."""
        ends = (self.change.mean, self.change.low, self.change.high)
        scale, digits, unit = (100, 1, " %") if self.relative else (1, 3, "")
        mean, low, high = (f"{scale * end:+.{digits}f}" for end in ends)
        if self.change.n < 2:
            said = "one example alone shows nothing about the next"
        elif self.better is None:
            said = "the interval contains no difference, so neither is shown to be better"
        else:
            said = f"{self.better} is better"
        return (
            f"{self.metric.replace('_', ' ')} on {self.domain}, {self.model} against {self.other}: "
            f"{mean}{unit} [{low}, {high}]; {said}"
        )

    def to_record(self) -> dict[str, Any]:
        """Return the record of kind ``comparison`` that reports read."""
        return {
            "kind": "comparison",
            "metric": self.metric,
            "domain": self.domain,
            "model": self.model,
            "other": self.other,
            "change": self.change.to_dict(),
            "relative": self.relative,
            "better": self.better,
            "sentence": self.sentence,
        }


def compare_perplexity(
    ours: Perplexity, theirs: Perplexity, model: str, other: str, domain: str
) -> Comparison:
    """Compare two perplexities of the same tokens; a DataError for others."""
    change = perplexity_increase(ours, theirs)
    return Comparison("perplexity", domain, model, other, change, True, True)


def compare_scores(
    ours: Floats,
    theirs: Floats,
    model: str,
    other: str,
    domain: str,
    metric: str,
) -> Comparison:
    """Compare two scores of which more is better, one number an example, of the same examples."""
    if len(ours) != len(theirs):
        raise DataError(
            f"{metric} of {domain} is over {len(ours)} examples for {model} and {len(theirs)} for "
            f"{other}; evaluate both on the same"
        )
    change = paired_difference(ours, theirs)
    return Comparison(metric, domain, model, other, change, False, False)


def compare_rates(
    ours: Rate, theirs: Rate, model: str, other: str, domain: str, metric: str
) -> Comparison:
    """Compare two rates of which less is better, such as transfers per token, as a ratio."""
    over = paired_ratio(ours[0], theirs[0], ours[1], theirs[1])
    change = Estimate(over.mean - 1, over.low - 1, over.high - 1, over.n)
    return Comparison(metric, domain, model, other, change, True, True)
