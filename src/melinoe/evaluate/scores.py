"""Score one model on a text, compare two on the same one, and make records for `report`."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from melinoe.data import Encoded, Example, encode
from melinoe.engine.handle import Handle
from melinoe.errors import AttachError, DataError
from melinoe.evaluate.completions import complete, reference
from melinoe.evaluate.perplexity import (
    Floats,
    Perplexity,
    decoded_perplexity,
    perplexity,
    perplexity_increase,
)
from melinoe.moe.choice import ChoiceSettings
from melinoe.stats import Estimate, bootstrap, paired_difference, paired_ratio

Rate = tuple[Sequence[float], Sequence[float]]  # numerators and denominators, one per example
# How a metric is computed, where its name alone leaves it open.
_HOW = {
    "rouge_l": "rouge-score's ROUGE-L, F1, Porter stemmer",
    "exact_match": "the number after the first '####', greedy completions",
}
_ANSWER = re.compile(r"####\s*(-?\s*\$?\s*-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\s*\$?\s*\.[0-9]+)")


def extract_answer(text: str) -> Decimal | None:
    """
    Return the number after the first ``####``, as GSM8K marks answers, however it is written.

    The first mark counts, because a model that goes on after its answer starts the next question.
    """
    found = _ANSWER.search(text)
    if found is None:
        return None
    try:
        return Decimal(re.sub(r"[$,\s]", "", found.group(1)))
    except InvalidOperation:
        return None


def right_answers(completions: Sequence[str], references: Sequence[str]) -> Floats:
    """Score each completion 1 if its answer equals the reference's, else 0."""
    _check(completions, references)
    right = np.zeros(len(references))
    for index, (completion, right_one) in enumerate(zip(completions, references, strict=True)):
        wanted = extract_answer(right_one)
        if wanted is None:
            raise DataError(
                f"reference {index} has no number after '####'; exact match needs GSM8K's form"
            )
        right[index] = extract_answer(completion) == wanted
    return right


def rouge_l(completions: Sequence[str], references: Sequence[str]) -> Floats:
    """
    Score each completion by the F1 of its longest common subsequence of words with the reference.

    Words are runs of a-z and 0-9, lower-cased, those of more than three letters stemmed by Porter's
    rules. A completion without words scores 0; a reference without one is a DataError.

    Source:
        Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004; computed by the
        rouge-score package.
    """
    _check(completions, references)
    # Imports nltk, and is needed for this score only.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenize import tokenize

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = np.zeros(len(references))
    for index, (completion, right_one) in enumerate(zip(completions, references, strict=True)):
        if not tokenize(right_one, None):
            raise DataError(
                f"reference {index} has no word of a-z or 0-9, so it has no ROUGE-L; score it by "
                "perplexity alone"
            )
        scores[index] = scorer.score(right_one, completion)["rougeL"].fmeasure
    return scores


def _check(completions: Sequence[str], references: Sequence[str]) -> None:
    if len(completions) != len(references):
        raise ValueError(f"{len(completions)} completions for {len(references)} references")
    if not references:
        raise DataError("there are no completions to score; give at least one example")


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


@dataclass(frozen=True)
class Scores:
    """
    The scores of one model on one text.

    *per_example* maps ``rouge_l`` and ``exact_match``, where measured, to one number per example;
    *settings* say how the completions were made.
    """

    model: str
    domain: str
    in_domain: bool
    perplexity: Perplexity
    per_example: dict[str, Floats] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """Return a record of kind ``quality``, and one of kind ``score`` per further metric."""
        found = [quality_record(self.perplexity, self.model, self.domain, self.in_domain)]
        for metric, values in self.per_example.items():
            found.append(score_record(values, self.model, self.domain, metric, **self.settings))
        return found

    def against(self, other: "Scores") -> list[Comparison]:
        """Compare with *other* on the same text, metric by metric, paired by example."""
        names = (self.model, other.model, self.domain)
        found = [compare_perplexity(self.perplexity, other.perplexity, *names)]
        for metric, values in self.per_example.items():
            if metric in other.per_example:
                found.append(compare_scores(values, other.per_example[metric], *names, metric))
        return found


def score(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    label: str,
    domain: str,
    *,
    in_domain: bool = True,
    rouge: bool = False,
    answers: bool = False,
    max_length: int = 512,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    progress: Callable[[str], None] | None = None,
) -> Scores:
    """
    Measure perplexity and, where asked for, ROUGE-L and exact match of greedy completions.

    *label* and *domain* name model and text in records, *max_length* bounds a sequence behind the
    perplexity; the rest as in `complete`. What the data alone shows to be wrong is a DataError
    before anything is generated.
    """
    # A reference that is missing or has no answer is found before minutes of generating.
    references = [reference(example) for example in examples] if rouge or answers else []
    if answers:
        right_answers(references, references)
    found = perplexity(model, encode(examples, tokenizer, max_length), batch_size)
    scores = Scores(label, domain, in_domain, found)
    if references:
        texts = complete(model, tokenizer, examples, max_new_tokens, batch_size, progress)
        scores.settings.update(max_new_tokens=max_new_tokens, batch_size=batch_size)
        if rouge:
            scores.per_example["rouge_l"] = rouge_l(texts, references)
        if answers:
            scores.per_example["exact_match"] = right_answers(texts, references)
    return scores


def quality_record(
    result: Perplexity, model: str, domain: str, in_domain: bool, **more: Any
) -> dict[str, Any]:
    """Return the record of kind ``quality``, with *more* fields."""
    return {
        "kind": "quality",
        "model": model,
        "domain": domain,
        "in_domain": in_domain,
        "perplexity": result.estimate.to_dict(),
        "tokens": int(result.tokens.sum()),
        # So that two models can be paired later.
        "per_sequence": {"nll": result.nll.tolist(), "tokens": result.tokens.astype(int).tolist()},
        **more,
    }


def score_record(
    values: Floats, model: str, domain: str, metric: str, **more: Any
) -> dict[str, Any]:
    """Return the record of kind ``score``, of one number per example."""
    right = {"right": int(values.sum())} if metric == "exact_match" else {}
    return {
        "kind": "score",
        "model": model,
        "domain": domain,
        "metric": metric,
        "score": bootstrap(values).to_dict(),
        "per_example": [float(value) for value in values],
        **right,
        "how": _HOW[metric],
        **more,
    }


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
    rates = {
        one: (of.loads.tolist(), of.tokens.tolist())
        for one, of in ((label, exact), (name, changed))
    }
    if exact.loads.sum():  # else there is no transfer to save
        found.append(compare_rates(rates[name], rates[label], name, label, domain, metric))
    about = {
        "choice": asdict(settings),
        "changed_choices": replaced,
        "transfers_metric": metric,
        "transfers": {one: bootstrap(*rate).to_dict() for one, rate in rates.items()},
    }
    return quality_record(changed.perplexity, name, domain, in_domain, **about), found
