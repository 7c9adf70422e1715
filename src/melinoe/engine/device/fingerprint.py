"""Whether a model is still the one that a captured step knows: its memory, its hooks, its modes."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# What decides in Python how a module computes; all but the first are PEFT's.
_MODES = ("training", "_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def fingerprint(model: nn.Module) -> int:
    """
    Changes if weights are put elsewhere, hooks come or go, adapters are switched or scaled, or
    another implementation of attention is chosen.

    Weights that are changed where they lie do not matter: a captured step reads them anew. Takes
    about a millisecond for a few hundred modules, so it is asked once a generation.
    """
    config: Any = getattr(model, "config", None)
    texts = [config, config.get_text_config(decoder=True)] if config is not None else []
    parts: list[Any] = [getattr(one, "_attn_implementation", None) for one in texts]
    for module in model.modules():
        own = vars(module)
        for held in (own["_parameters"], own["_buffers"]):
            parts += [0 if tensor is None else tensor.data_ptr() for tensor in held.values()]
        parts += [tuple(own[name]) for name in _HOOKS]
        parts += [str(own[name]) for name in _MODES if name in own]
        parts.append(id(own.get("forward")))
    return hash(tuple(parts))
