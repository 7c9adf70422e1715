"""What was measured, as records that `report` reads."""

from typing import Any

from melinoe.evaluate.perplexity import Floats, Perplexity
from melinoe.evaluate.rouge import SETTINGS as ROUGE_SETTINGS
from melinoe.stats import Estimate, bootstrap

# How a metric is computed, where its name alone leaves it open.
_SAID = {
    "rouge_l": ROUGE_SETTINGS,
    "exact_match": "the number after the first '####', greedy completions",
}


def quality_record(
    result: Perplexity, model: str, domain: str, in_domain: bool, **more: Any
) -> dict[str, Any]:
    """
    Return the record of kind ``quality``.

    Args:
        result: What `perplexity` measured.
        model: Label of the model.
        domain: Name of the text.
        in_domain: Whether the model was fine-tuned on text of this kind.
        more: Further fields, such as ``"increase"`` over a control.
    """
    return {
        "kind": "quality",
        "model": model,
        "domain": domain,
        "in_domain": in_domain,
        "perplexity": result.estimate.to_dict(),
        "nll": result.mean_nll.to_dict(),
        "tokens": int(result.tokens.sum()),
        # Whoever compares two models later can pair them.
        "per_sequence": {"nll": result.nll.tolist(), "tokens": result.tokens.astype(int).tolist()},
        **more,
    }


def score_record(
    values: Floats | Estimate, model: str, domain: str, metric: str, **more: Any
) -> dict[str, Any]:
    """
    Return the record of kind ``score``: the mean of one number per example, with its interval.

    Args:
        values: One number per example; or the estimate itself, where only that is known.
        model: Label of the model.
        domain: Name of the text or task.
        metric: Name of the score; ``exact_match`` also gets how many were right.
        more: Further fields, such as settings.
    """
    record: dict[str, Any] = {"kind": "score", "model": model, "domain": domain, "metric": metric}
    if isinstance(values, Estimate):
        record["score"] = values.to_dict()
    else:
        record["score"] = bootstrap(values).to_dict()
        record["per_example"] = [float(value) for value in values]
        if metric == "exact_match":
            record["right"] = int(values.sum())
    if metric in _SAID:
        record["how"] = _SAID[metric]
    return record | more
