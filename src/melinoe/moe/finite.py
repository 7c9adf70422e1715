"""
Stop where a model's output is no number, and say which layer and which tensor made it so.

The check is one maximum over the vocabulary of logits that are there anyway. Only when it fails is
the model run once more, with an eye on each module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from melinoe.errors import ModelError
from melinoe.moe.dispatch import bound
from melinoe.moe.experts import is_experts_module


def are_finite(logits: Tensor) -> bool:
    """
    Whether each row of *logits* ``(..., vocabulary)`` has a largest one that is a number.

    Single logits may be -inf: masked tokens are, and padding of the vocabulary. Waits for the
    device.
    """
    return bool(logits.amax(-1).isfinite().all())


def not_finite(model: nn.Module, inputs: Mapping[str, Any], what: str) -> ModelError:
    """
    Make the error that says where it comes from that *what* is no finite number.

    Args:
        model: offloaded or not.
        inputs: of the call that gave it; the model is called with them once more.
        what: such as ``the loss of example 3``.
    """
    return ModelError(f"{what} is not finite: {_cause(model, inputs)}")


def broken_weight(model: nn.Module) -> str | None:
    """Name the first weight of *model* that holds NaN or infinity; None if all are numbers."""
    for name, module in model.named_modules():
        found = _broken(name, module)
        if found is not None:
            return found
    return None


def generate_finite(model: Any, *inputs: Any, **options: Any) -> Any:
    """
    Call the ``generate`` of *model*, and stop at the first logits that are no numbers.

    Raises:
        ModelError: there are such; it names the layer and the tensor.
    """
    processors = LogitsProcessorList([*options.pop("logits_processor", ()), _Watch()])
    try:
        return model.generate(*inputs, **options, logits_processor=processors)
    except _NotFiniteError as error:
        ids = error.ids
    raise not_finite(model, {"input_ids": ids}, "what the model says")


class _NotFiniteError(Exception):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids


class _Watch(LogitsProcessor):
    """Looks at the logits of each step, before anything is drawn from them."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not are_finite(scores):
            raise _NotFiniteError(input_ids)
        return scores


class _FoundError(Exception):
    pass


def _cause(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """The module that is first to make NaN or infinity of numbers, and why it does."""
    found: list[tuple[str, nn.Module, str]] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                kind = _kind(tensor)
                if kind is not None:
                    found.append((name, module, kind))
                    raise _FoundError

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(look(name)).remove)
        try:
            with torch.no_grad():
                model(**inputs)
        except _FoundError:
            pass
    if not found:
        return "only in that call; run it again, and if it stays so, load the model in float32"
    name, module, kind = found[0]
    broken = _broken(name, module) or broken_weight(model)
    if broken is not None:
        return f"{name} gave {kind}, because {broken}; get the checkpoint's files again"
    return (
        f"{name} gave {kind} though its weights are numbers, so they grew beyond the model's type; "
        "load it in float32, or in bfloat16 if it is in float16"
    )


def _broken(name: str, module: nn.Module) -> str | None:
    """Which tensor of *module* itself holds what is no number; offloaded experts included."""
    for key, parameter in module.named_parameters(recurse=False):
        kind = _kind(parameter)
        if kind is not None:
            return f"{name}.{key} holds {kind}"
    if is_experts_module(module):
        for expert, key, tensor in _offloaded(module):
            kind = _kind(tensor)
            if kind is not None:
                return f"expert {expert} of {name} holds {kind} in its {key}"
    return None


def _offloaded(module: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
    read: Any = getattr(bound(module), "read", None)
    if read is None:
        return
    for expert in range(int(module.num_experts)):  # type: ignore[arg-type]
        for key, tensor in read(expert).items():
            yield expert, key, tensor


def _kind(tensor: Tensor) -> str | None:
    """NaN or infinity, if *tensor* holds it; -inf alone is how something is masked."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return None
    largest = tensor.detach().max()
    if largest.isnan():
        return "NaN"
    return "infinity" if largest == float("inf") else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
