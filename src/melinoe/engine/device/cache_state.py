"""
What a static cache keeps beside its tensors, and what of that a captured step depends on.

A captured step has the cache's memory and whatever Python read of it for good. So steps are of
one kind only if all of that agrees. One number may differ: how many tokens a sliding window has
seen, of which a step only asks whether the window is full. Replays run no Python, so this number is
brought forward by whoever replays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

# Counts tokens; a step of one token asks only whether it has reached `max_cache_len`.
_COUNT = "cumulative_length_int"
_ASKING = ("get_seq_length", "get_mask_sizes")


class CacheKind:
    """
    What captured steps on a cache have in common.

    Attributes:
        layers: by layer its class, where its tensors lie, and what else it holds.
        full: of the layers that count in Python, whether the window is full.
    """

    def __init__(self, layers: tuple[tuple[str, tuple], ...], full: tuple[bool, ...]) -> None:
        self.layers, self.full = layers, full
        self._hash = hash((layers, full))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheKind) and (
            self.full == other.full and (self.layers is other.layers or self.layers == other.layers)
        )


class Kinds:
    """The kind of a cache; a cache is looked through once, and then only for changes."""

    def __init__(self) -> None:
        self._layers: tuple[tuple[str, tuple], ...] = ()
        self._last = CacheKind((), ())
        self.forget()

    def forget(self) -> None:
        """Let go of the cache's memory."""
        self._cache: Callable[[], Any] = lambda: None
        self._seen: list[tuple[Any, Any, Any]] = []
        self._holders: list[Any] = []
        self._size = 0

    def of(self, cache: StaticCache) -> CacheKind:
        """The kind of *cache* now."""
        if self._cache() is not cache or self._changed():
            self._look_through(cache)
        counting = (own for own in map(vars, _layers(cache)) if _COUNT in own)
        full = tuple([own[_COUNT] >= own["max_cache_len"] for own in counting])
        if self._last.layers is not self._layers or self._last.full != full:
            self._last = CacheKind(self._layers, full)
        return self._last

    def _changed(self) -> bool:
        return sum(map(len, self._holders)) != self._size or any(
            [holder[name] is not value for holder, name, value in self._seen]
        )

    def _look_through(self, cache: StaticCache) -> None:
        self.forget()
        mine = weakref.ref(self)

        def gone(cache: Any) -> None:  # who had the cache needs its memory no more
            kinds = mine()
            if kinds is not None and kinds._cache is cache:
                kinds.forget()

        self._cache = weakref.ref(cache, gone)
        found = []
        for layer in _layers(cache):
            fixed: list[tuple] = []
            for holder, name, path, value in _parts(vars(layer)):
                if path == _COUNT:
                    continue
                if isinstance(value, Tensor):
                    where = value.data_ptr(), tuple(value.shape), value.stride(), value.dtype
                    fixed.append((path, *where))
                elif value is None or isinstance(value, bool | int | str):
                    fixed.append((path, value))
                self._seen.append((holder, name, value))
                if not any(holder is one for one in self._holders[-8:]):
                    self._holders.append(holder)
            found.append((type(layer).__name__, tuple(fixed)))
        self._layers, self._size = tuple(found), sum(map(len, self._holders))


def moved(before: CacheKind, after: CacheKind) -> set[str]:
    """Classes of layers that a step of one token left with other memory or other settings."""
    pairs = zip(before.layers, after.layers, strict=True)
    return {new[0] for old, new in pairs if old != new}


def counts(cache: StaticCache) -> list[int | None]:
    """By layer: how many tokens Python says there are; None where it does not count."""
    return [vars(layer).get(_COUNT) for layer in _layers(cache)]


def set_counts(cache: StaticCache, values: list[int | None], more: int = 0) -> None:
    """Make `counts` be *values*, each with *more* tokens."""
    for layer, value in zip(_layers(cache), values, strict=True):
        if value is not None:
            setattr(layer, _COUNT, value + more)


@contextmanager
def uncounted(cache: StaticCache) -> Iterator[None]:
    """
    In the body nobody may ask a layer that counts in Python for its length.

    Raises:
        RuntimeError: in the body, to whoever asks: a captured step would keep the answer.
    """

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the model asks its cache for a number of tokens within a step")

    layers = [vars(layer) for layer in _layers(cache) if _COUNT in vars(layer)]
    for own in layers:
        own.update(dict.fromkeys(_ASKING, refuse))
    try:
        yield
    finally:
        for own in layers:
            for name in _ASKING:
                del own[name]


def tensors(layer: Any) -> list[Tensor]:
    """All tensors of a layer."""
    return [value for *_, value in _parts(vars(layer)) if isinstance(value, Tensor)]


def empty_for(used: Any, fresh: Any) -> bool:
    """
    Empty a used layer, and say whether it can stand for a fresh one; if not, it is of no use.

    What it was made with must agree, and its memory must be writable as the fresh one's will be.
    """
    inference = torch.is_inference_mode_enabled()
    held = tensors(used)
    if type(used) is not type(fresh) or any(one.is_inference() != inference for one in held):
        return False
    used.reset()
    now = {path: value for _, _, path, value in _parts(vars(used))}
    made = {path: value for _, _, path, value in _parts(vars(fresh)) if type(value) is int}
    return all(now.get(path) == value for path, value in made.items())


def _layers(cache: StaticCache) -> list[Any]:
    return cache.layers


def _parts(holder: Mapping[Any, Any], before: str = "") -> Iterator[tuple[Any, Any, str, Any]]:
    """What a layer holds, and what it holds in dictionaries: holder, key, path and value."""
    for name, value in holder.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{before}{name}.")
        else:
            yield holder, name, f"{before}{name}", value
