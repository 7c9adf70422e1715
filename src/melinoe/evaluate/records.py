"""What was measured, as records that `report` reads."""

from typing import Any

from melinoe.evaluate.perplexity import Perplexity


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
        **more,
    }
