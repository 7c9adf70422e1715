"""Stand beside a model's ``generate``: learn the prompt's length, and keep it from compiling."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig

from melinoe.engine.calls import Generating
from melinoe.engine.passes import ForwardPasses
from melinoe.errors import TraceError

_log = logging.getLogger("melinoe")


def watch_generate(
    model: nn.Module, passes: ForwardPasses, *, may_compile: bool = False
) -> Callable[[], None]:
    """
    Put a ``generate`` before the model's own that tells *passes* when it begins and ends.

    Unless *may_compile*, it also forbids compilation, which transformers begins by itself with a
    static cache on a GPU: the experts ask the host who is resident, once per layer, and that cannot
    be compiled. The caller's generation config is not touched; the model's own is, until the end.

    Returns:
        A function that puts back what was there.
    """
    original = getattr(model, "generate", None)
    if not callable(original):
        return lambda: None
    before = vars(model).get("generate")
    config = getattr(model, "generation_config", None)
    compiling = getattr(config, "disable_compile", None)
    if config is not None and not may_compile:
        config.disable_compile = True

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if not may_compile:
            args, kwargs = _uncompiled(args, kwargs)
        # Before anything runs: transformers shortens the model for its guesses, and an exception
        # in the middle of that would leave it short.
        early = _exits_early(config, args, kwargs)
        if passes.recorder is not None and early:
            raise TraceError(
                "a trace cannot hold guesses that the model makes with its own first layers; "
                "generate without assistant_early_exit, or do not record"
            )
        known = _prompt_of(model, args, kwargs)
        if known is not None:
            known.guesses = early or kwargs.get("assistant_model") is model
        with passes.generate(known):
            return original(*args, **kwargs)

    def restore() -> None:
        vars(model).pop("generate", None)
        if before is not None:
            vars(model)["generate"] = before
        if config is not None and not may_compile:
            config.disable_compile = compiling

    vars(model)["generate"] = generate  # not setattr: nothing of it may be registered
    return restore


def _uncompiled(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, with whatever they say about compilation turned off."""
    if len(args) > 1 and isinstance(args[1], GenerationConfig):
        args = (args[0], _without_compiling(args[1]), *args[2:])
    if kwargs.get("disable_compile") is False:
        _log.warning("disable_compile=False is overruled: offloaded experts cannot be compiled")
        kwargs = kwargs | {"disable_compile": True}
    if kwargs.get("generation_config") is not None:
        kwargs = kwargs | {"generation_config": _without_compiling(kwargs["generation_config"])}
    return args, kwargs


def _without_compiling(config: GenerationConfig) -> GenerationConfig:
    """A copy that forbids compilation."""
    own = copy.deepcopy(config)
    own.disable_compile = True
    return own


def _exits_early(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether guesses are asked of the model's own first layers."""
    if "assistant_early_exit" in kwargs:
        return kwargs["assistant_early_exit"] is not None
    own = kwargs.get("generation_config", args[1] if len(args) > 1 else None) or config
    return getattr(own, "assistant_early_exit", None) is not None


def _prompt_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generating | None:
    """What ``generate`` was asked to continue; None where that are not tokens in a row."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    given = [*args[:1], *(kwargs.get(k) for k in ("inputs", "input_ids", "inputs_embeds"))]
    # The mask covers what a cache holds already where only the new tokens are given.
    given.append(kwargs.get("attention_mask"))
    lengths = [one.shape[1] for one in given if isinstance(one, Tensor) and one.dim() >= 2]
    if not lengths:
        return None
    given_config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    sizes = [kwargs.get("prefill_chunk_size")]
    sizes += [
        getattr(one, "prefill_chunk_size", None)
        for one in (given_config, getattr(model, "generation_config", None))
    ]
    return Generating(max(lengths), chunked=any(sizes))
