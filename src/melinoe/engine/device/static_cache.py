"""
transformers' static cache as a captured step knows it: its memory, and its state in Python.

A captured step uses the memory that the cache had, and repeats whatever Python read from it then,
so steps are of one kind only if all of that agrees (`CacheKinds`). One number may differ: how many
tokens a sliding window has seen, since a step asks only whether the window is full. Whoever replays
brings it forward.
"""

from __future__ import annotations

import inspect
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

# A layer's count of tokens that Python keeps.
_COUNT = "cumulative_length_int"
_ASKING = ("get_seq_length", "get_mask_sizes")
# Kinds of caches that are remembered.
_MOST_CACHES = 64


def why_not_static(model_class: Any, config: Any) -> str | None:
    """Say why ``generate`` cannot decode with a static cache; None if it can."""
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


def describe(cache: StaticCache) -> tuple[tuple[str, tuple], ...]:
    """List by layer its class, where its tensors lie, and its other settings but `_COUNT`."""
    found = []
    for layer in cache.layers:
        fixed: list[tuple] = []
        for name, path, value in _parts(vars(layer)):
            if isinstance(value, Tensor):
                where = value.data_ptr(), tuple(value.shape), value.stride(), value.dtype
                fixed.append((path, *where))
            elif name != _COUNT and (value is None or isinstance(value, bool | int | str)):
                fixed.append((path, value))
        found.append((type(layer).__name__, tuple(fixed)))
    return tuple(found)


def moved(before: tuple, after: tuple) -> set[str]:
    """Name the classes of layers whose descriptions differ: other memory or other settings."""
    return {new[0] for old, new in zip(before, after, strict=True) if old != new}


class CacheKinds:
    """Numbers for caches that captured steps cannot tell apart; equal descriptions share one."""

    def __init__(self) -> None:
        self._numbers: dict[tuple, int] = {}
        self._next = itertools.count()
        # By cache, its number and the very values that it was described by.
        self._seen: weakref.WeakKeyDictionary[StaticCache, tuple[int, list[Any]]]
        self._seen = weakref.WeakKeyDictionary()

    def of(self, cache: StaticCache) -> tuple[int, tuple[bool, ...]]:
        """The kind of *cache* now: its number, and which of its layers' windows are full."""
        layers = list(map(vars, cache.layers))
        values = [v for own in layers for name, _, v in _parts(own) if name != _COUNT]
        number, known = self._seen.get(cache, (-1, []))
        same = len(values) == len(known) and all(map(operator.is_, values, known))
        if not same:
            if len(self._numbers) >= _MOST_CACHES:
                self._numbers.clear()  # a number is never used again
            number = self._numbers.setdefault(describe(cache), next(self._next))
            self._seen[cache] = number, values
        full = [own[_COUNT] >= own["max_cache_len"] for own in layers if _COUNT in own]
        return number, tuple(full)


def counts(cache: StaticCache) -> list[int | None]:
    """Tokens of each layer as Python counts them; None where it does not count."""
    return [vars(layer).get(_COUNT) for layer in cache.layers]


def set_counts(cache: StaticCache, values: list[int | None], more: int = 0) -> None:
    """Make `counts` be *values*, each with *more* tokens."""
    for layer, value in zip(cache.layers, values, strict=True):
        if value is not None:
            setattr(layer, _COUNT, value + more)


@contextmanager
def uncounted(cache: StaticCache) -> Iterator[None]:
    """Forbid in the body to ask a layer for a length that a graph would keep."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the model asks its cache for a number of tokens within a step")

    layers = [vars(layer) for layer in cache.layers if _COUNT in vars(layer)]
    for own in layers:
        own.update(dict.fromkeys(_ASKING, refuse))
    try:
        yield
    finally:
        for own in layers:
            for name in _ASKING:
                del own[name]


class KeptCache:
    """Gives ``generate`` its last static cache's memory again, while nobody else holds it."""

    def __init__(self, renewed: Callable[[], None]) -> None:
        self._renewed = renewed
        self.forget()

    def forget(self) -> None:
        """Let go of the memory."""
        self._cache: Callable[[], Any] = lambda: None
        self._layers: list[Any] = []
        self._batch = 0

    def reusing(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function to stand for *prepare*, a model's own ``_prepare_static_cache``."""
        takes = inspect.signature(prepare)

        def reuse(*args: Any, **kwargs: Any) -> Any:
            given = takes.bind(*args, **kwargs)
            batch = given.arguments.get("batch_size")
            fresh = prepare(*given.args, **given.kwargs)
            if type(fresh) is not StaticCache or batch is None:
                return fresh
            if (
                self._cache() is None
                and batch == self._batch
                and len(self._layers) == len(fresh.layers)
                and all(map(_empty_for, self._layers, fresh.layers))
            ):
                fresh.layers = self._layers
            else:
                self._renewed()
            self._cache, self._layers, self._batch = weakref.ref(fresh), fresh.layers, batch
            return fresh

        return reuse


def _empty_for(used: Any, fresh: Any) -> bool:
    """
    Empty a used layer, and tell whether it can stand for a fresh one; if not, it is of no use.
    """
    inference = torch.is_inference_mode_enabled()
    held = tensors(used)
    if type(used) is not type(fresh) or any(one.is_inference() != inference for one in held):
        return False
    used.reset()
    now = {path: value for _, path, value in _parts(vars(used))}
    made = {path: value for _, path, value in _parts(vars(fresh)) if type(value) is int}
    return all(now.get(path) == value for path, value in made.items())


def tensors(layer: Any) -> list[Tensor]:
    """All tensors of a layer."""
    return [value for *_, value in _parts(vars(layer)) if isinstance(value, Tensor)]


def _parts(holder: Mapping[Any, Any], before: str = "") -> Iterator[tuple[Any, str, Any]]:
    """Walk a layer's attributes and the dictionaries in them: key, path, value."""
    for name, value in holder.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{before}{name}.")
        else:
            yield name, f"{before}{name}", value
