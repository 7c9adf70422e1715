"""Where transformers' `generate` is told to use our steps: a few settings and two methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import StaticCache

_SETTINGS = ("disable_compile", "cache_implementation")
_METHODS = ("get_compiled_call", "_prepare_static_cache")


def forbid_compiling(model: Any) -> Callable[[], None]:
    """Let `generate` compile nothing by itself; returns what undoes it."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return lambda: None
    undo = _undo(model, config)
    config.disable_compile = True
    return undo


def answer(
    model: Any,
    step: Callable[..., Any],
    reusing: Callable[[Callable[..., Any]], Callable[..., Any]],
    static: bool,
) -> Callable[[], None]:
    """
    Let `generate` take *step* where it asks for a compiled forward.

    It asks on a GPU, where its cache is static.

    Args:
        model: a transformers model.
        step: one forward pass.
        reusing: makes of the model's way to prepare a static cache another one.
        static: whether a static cache is to be the default.

    Returns:
        What undoes it.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return lambda: None
    undo = _undo(model, config)
    config.disable_compile = False
    if static and config.cache_implementation is None:
        config.cache_implementation = "static"
    vars(model)["get_compiled_call"] = lambda *_: step
    prepare = getattr(model, "_prepare_static_cache", None)
    if prepare is not None:
        vars(model)["_prepare_static_cache"] = reusing(prepare)
    return undo


def why_not_static(model_class: Any, config: Any) -> str | None:
    """Why `generate` of such a model cannot decode with a static cache; None if it can."""
    kind = config.model_type
    try:
        cache = StaticCache(config=config, max_cache_len=1)
    except Exception:  # a kind of layer that has none
        return f"{kind} has no static cache"
    if not cache.is_compileable:
        return f"the static cache of {kind} moves in memory"
    if not getattr(model_class, "_can_compile_fullgraph", False):
        return f"a step of {kind} looks at values on its way"
    return None


def _undo(model: Any, config: Any) -> Callable[[], None]:
    before = {name: getattr(config, name, None) for name in _SETTINGS}
    own = {name: vars(model).get(name) for name in _METHODS}

    def undo() -> None:
        for name, value in before.items():
            setattr(config, name, value)
        for name, method in own.items():
            vars(model).pop(name, None)
            if method is not None:
                vars(model)[name] = method

    return undo
