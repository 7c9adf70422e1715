"""
Stop when a model's output is not finite, and say which layer and which tensor made it so.

The check is one maximum over the vocabulary of logits that are there anyway. Only when it fails is
the model run once more, with a hook on each module. Weights beside the experts are looked at as
they are loaded, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from melinoe.errors import ModelError
from melinoe.moe.dispatch import bound
from melinoe.moe.experts import is_experts_module

# What a checkpoint's own generation settings may ask for, and nobody here can take: several texts,
# another kind of output, passes of its own, an end by the clock.
_ONE_TEXT: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    "stop_strings": None, "max_time": None, "guidance_scale": None,
    "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "penalty_alpha": None,
    "dola_layers": None,
}  # fmt: skip
GREEDY: dict[str, Any] = {
    "do_sample": False, "temperature": None, "top_p": None, "top_k": None,
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": None,
    "exponential_decay_length_penalty": None, "watermarking_config": None,
}  # fmt: skip
"""The likeliest token at each step, whatever a checkpoint's own generation settings are."""


def are_finite(logits: Tensor) -> bool:
    """Tell whether the largest of each row of *logits* is finite; masked ones may be -inf."""
    return bool(logits.amax(-1).isfinite().all())


class _FoundError(Exception):
    """Its argument is what was found."""


def generate_finite(model: Any, *inputs: Any, **options: Any) -> Any:
    """Call ``generate`` for one text a row; a ModelError at the first logits not finite."""

    def watch(input_ids: Any, scores: Any) -> Any:
        if not are_finite(scores):
            raise _FoundError(input_ids)
        return scores

    processors = LogitsProcessorList([*options.pop("logits_processor", ()), watch])
    try:
        return model.generate(*inputs, **{**_ONE_TEXT, **options}, logits_processor=processors)
    except _FoundError as error:
        ids = error.args[0]
    raise not_finite(model, {"input_ids": ids}, "what the model says")


def not_finite(model: nn.Module, inputs: Mapping[str, Any], what: str) -> ModelError:
    """Make the error that says which module made *what* not finite, from one more call."""

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for kind in filter(None, map(_kind, _tensors(output))):
                raise _FoundError(name, module, kind)

        return hook

    cause = "only in that call; run it again, and if it stays so, load the model in float32"
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(look(name)).remove)
        try:
            with torch.no_grad():
                model(**inputs)
        except _FoundError as error:
            name, module, kind = error.args
            broken = _broken(name, module) or broken_weight(model)
            cause = f"{name} gave {kind}" + (
                f", because {broken}; get the checkpoint's files again"
                if broken is not None
                else " though its weights are numbers, so they grew beyond the model's type; load "
                "it in float32, or in bfloat16 if it is in float16"
            )
    return ModelError(f"{what} is not finite: {cause}")


def broken_weight(model: nn.Module) -> str | None:
    """Name the first weight of *model*, or of this process's shards, that holds NaN or infinity."""
    return next(filter(None, (_broken(*named) for named in model.named_modules())), None)


def _broken(name: str, module: nn.Module) -> str | None:
    """Name a tensor of *module* itself that holds NaN or infinity; also of offloaded experts."""
    for key, parameter in module.named_parameters(recurse=False):
        if kind := _kind(parameter, masks=parameter.dim() < 2):
            return f"{name}.{key} holds {kind}"
    read: Any = getattr(bound(module), "read", None) if is_experts_module(module) else None
    for expert in range(int(module.num_experts)) if read is not None else ():  # type: ignore[arg-type]
        for key, tensor in read(expert).items():
            if kind := _kind(tensor, masks=False):
                return f"expert {expert} of {name} holds {kind} in its {key}"
    return None


def _kind(tensor: Tensor, masks: bool = True) -> str | None:
    """Return NaN or infinity if *tensor* holds it; -inf alone may be how something is masked."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return None
    low, high = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().aminmax()
    if high.isnan():
        return "NaN"
    return "infinity" if high == float("inf") or (low == -float("inf") and not masks) else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
