"""Compare two models on one text, price a choice of experts, and make records for `report`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from melinoe.data import Encoded
from melinoe.engine.handle import Handle
from melinoe.errors import AttachError
from melinoe.evaluate.perplexity import Perplexity, decoded_perplexity, perplexity_increase
from melinoe.moe.choice import ChoiceSettings
from melinoe.stats import Estimate, bootstrap, paired_ratio


@dataclass(frozen=True)
class Comparison:
    """
    The difference of *model* from *other* in one metric of one text (*domain*), paired.

    *change* is the model's value over the other's, minus 1; of every metric less is better.
    """

    metric: str
    domain: str
    model: str
    other: str
    change: Estimate

    @property
    def better(self) -> str | None:
        """The better model; ``None`` where the interval holds no difference, or n is 1."""
        if self.change.n < 2 or self.change.low <= 0 <= self.change.high:
            return None
        return self.model if self.change.mean < 0 else self.other

    @property
    def sentence(self) -> str:
        """A sentence on how the two differ, and which is better or that none is shown to be."""
        ends = (self.change.mean, self.change.low, self.change.high)
        mean, low, high = (f"{100 * end:+.1f}" for end in ends)
        if self.change.n < 2:
            said = "one example alone shows nothing about the next"
        elif self.better is None:
            said = "the interval contains no difference, so neither is shown to be better"
        else:
            said = f"{self.better} is better"
        who = f"{self.metric} on {self.domain}, {self.model} against {self.other}"
        return f"{who}: {mean} % [{low}, {high}]; {said}"

    def to_record(self) -> dict[str, Any]:
        """Return the record of kind ``comparison`` that reports read."""
        said = {"relative": True, "better": self.better, "sentence": self.sentence}
        return {"kind": "comparison", **asdict(self), **said}


def compare_perplexity(
    ours: Perplexity, theirs: Perplexity, model: str, other: str, domain: str
) -> Comparison:
    """Compare two perplexities of the same tokens; a DataError for others."""
    return Comparison("perplexity", domain, model, other, perplexity_increase(ours, theirs))


def compare_rates(
    ours: tuple[Any, Any], theirs: tuple[Any, Any], model: str, other: str, domain: str, metric: str
) -> Comparison:
    """
    Compare two rates of which less is better, such as transfers per token, as a ratio.

    A rate is numerators and denominators, one of each per example.
    """
    over = paired_ratio(ours[0], theirs[0], ours[1], theirs[1])
    change = Estimate(over.mean - 1, over.low - 1, over.high - 1, over.n)
    return Comparison(metric, domain, model, other, change)


def quality_record(
    result: Perplexity, model: str, domain: str, in_domain: bool, **more: Any
) -> dict[str, Any]:
    """Return the record of kind ``quality``, with *more* fields."""
    # So that two models can be paired later.
    each = {"nll": result.nll.tolist(), "tokens": result.tokens.astype(int).tolist()}
    about = {"kind": "quality", "model": model, "domain": domain, "in_domain": in_domain}
    about |= {"perplexity": result.estimate.to_dict(), "tokens": int(result.tokens.sum())}
    return {**about, "per_sequence": each, **more}


def price_of_choice(
    model: Any,
    handle: Handle,
    encoded: Sequence[Encoded],
    settings: ChoiceSettings,
    label: str,
    domain: str,
    *,
    in_domain: bool = True,
    progress: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], list[Comparison]]:
    """
    Read *encoded* token by token with exact choices and with changed ones, and compare them.

    Returns:
        A record of kind ``quality`` of the changed choices; the paired change of perplexity, and
        of transfers per token if the exact choices cost any. Choices are exact again afterwards.

    Raises:
        AttachError: *settings* change nothing, or the engine cannot change choices.
        UnsupportedModelError: routers whose choices cannot be changed.
        DataError: as `decoded_perplexity`.
    """
    if settings.kind == "exact":
        raise AttachError("the exact choice has no price; name cache-prior")
    handle.choose(settings)  # refused, if at all, before minutes of reading
    handle.choose(ChoiceSettings())
    exact = decoded_perplexity(model, handle, encoded, progress=progress)
    handle.choose(settings)
    try:
        changed = decoded_perplexity(model, handle, encoded, progress=progress)
        replaced = handle.changed_choices
    finally:
        handle.choose(ChoiceSettings())
    name = f"{label}, {settings.kind} {settings.strength:g}"
    metric = f"transfers per decoded token ({handle.policy.upper()}, {handle.slots} slots)"
    found = [compare_perplexity(changed.perplexity, exact.perplexity, name, label, domain)]
    rates = {one: (of.loads, of.tokens) for one, of in ((label, exact), (name, changed))}
    if exact.loads.sum():  # else there is no transfer to save
        found.append(compare_rates(rates[name], rates[label], name, label, domain, metric))
    about = {
        "choice": asdict(settings),
        "changed_choices": replaced,
        "transfers_metric": metric,
        "transfers": {
            one: bootstrap(loads.astype(float), tokens.astype(float)).to_dict()
            for one, (loads, tokens) in rates.items()
        },
    }
    return quality_record(changed.perplexity, name, domain, in_domain, **about), found
