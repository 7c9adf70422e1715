"""Run a model up to its head, so that the logits of all tokens need not be there at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from melinoe.errors import UnsupportedModelError

_NOT_FOR_THE_MODEL = ("labels", "num_items_in_batch")


def model_outputs(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Run the model on what it takes of a batch, without a key-value cache."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}
    return model(**inputs, use_cache=False)


def logits_of(model: nn.Module, outputs: Any) -> Tensor:
    """Return the logits ``(batch, tokens, vocabulary)``; UnsupportedModelError without."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives hidden states but no logits, so it has no next-token "
            "loss to train on; load the class of its family that has a language-model head"
        )
    return logits


class Pass(NamedTuple):
    """
    A forward pass up to the head: the last hidden *states*, ``(batch, tokens, features)``, and the
    *head*, which makes logits of states ``(some, features)``. Of a model whose head cannot be told
    from its body, or is sharded, *states* are the logits and there is no head.
    """

    states: Tensor
    head: Callable[[Tensor], Tensor] | None
    vocabulary: int


def run_to_head(model: nn.Module, batch: dict[str, Any]) -> Pass:
    """Run the model without all tokens' logits: called again, with states, its code makes them."""
    whole: Any = getattr(model, "module", model)  # as wrapped for distributed training
    body = getattr(whole, "base_model", whole)
    found: list[Any] = []

    def keep_one(module: nn.Module, args: Any, output: Any) -> Any:
        if getattr(output, "last_hidden_state", None) is None:
            return output
        found.append(output)
        return _with_states(output, output.last_hidden_state[:, -1:])

    split = body is not whole and not isinstance(whole, FSDPModule)
    handle = body.register_forward_hook(keep_one) if split else None
    try:
        logits = logits_of(whole, model_outputs(model, batch))
    finally:
        if handle is not None:
            handle.remove()
    if len(found) != 1:
        return Pass(logits, None, logits.shape[-1])

    def head(rows: Tensor) -> Tensor:
        given, before = _with_states(found[0], rows[None]), body.__dict__.get("forward")
        body.forward = lambda *_, **__: given
        try:
            made = model_outputs(whole, {"input_ids": batch["input_ids"][:1, :1]})
            return logits_of(whole, made)[0]
        finally:
            del body.forward
            if before is not None:
                body.forward = before

    return Pass(found[0].last_hidden_state, head, logits.shape[-1])


def _with_states(output: Any, states: Tensor) -> Any:
    return type(output)(**{**output, "last_hidden_state": states})
