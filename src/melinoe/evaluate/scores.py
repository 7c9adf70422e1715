"""Score one model on one text, and make the records of it that `report` reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from melinoe.data import Example, encode
from melinoe.evaluate.compare import Comparison, compare_perplexity, compare_scores
from melinoe.evaluate.completions import complete, reference
from melinoe.evaluate.metrics import right_answers, rouge_l
from melinoe.evaluate.perplexity import Floats, Perplexity, perplexity
from melinoe.stats import Estimate, bootstrap

# How a metric is computed, where its name alone leaves it open.
_HOW = {
    "rouge_l": "rouge-score's ROUGE-L, F1, Porter stemmer",
    "exact_match": "the number after the first '####', greedy completions",
}


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
        """
        Compare with *other* on the same text, metric by metric, paired by example.

        Raises:
            DataError: the two are not of the same tokens or examples.
        """
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

    Args:
        model: A causal language model, offloaded or not.
        tokenizer: Its tokenizer.
        examples: At least one.
        label: The model's name in records; *domain* is the text's.
        in_domain: Whether the model was fine-tuned on text of this kind.
        rouge: Also ROUGE-L; see `rouge_l`.
        answers: Also exact match of GSM8K answers; see `right_answers`.
        max_length: Longest sequence behind the perplexity, in tokens.
        max_new_tokens: As in `complete`, as are *batch_size* and *progress*.

    Raises:
        DataError: as `encode`, `perplexity`, `complete`, `rouge_l` and `right_answers`; before
            anything is generated where the data alone shows it.
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
    values: Floats | Estimate, model: str, domain: str, metric: str, **more: Any
) -> dict[str, Any]:
    """Return the record of kind ``score``: of one number per example, or of an estimate alone."""
    record: dict[str, Any] = {"kind": "score", "model": model, "domain": domain, "metric": metric}
    if isinstance(values, Estimate):
        record["score"] = values.to_dict()
    else:
        record["score"] = bootstrap(values).to_dict()
        record["per_example"] = [float(value) for value in values]
        if metric == "exact_match":
            record["right"] = int(values.sum())
    if metric in _HOW:
        record["how"] = _HOW[metric]
    return record | more
