"""One static cache for many calls of `generate`: a captured step only knows its memory."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from transformers import StaticCache

from melinoe.engine.device import cache_state
from melinoe.engine.device.compiled import cache_length


class KeptCache:
    """
    The layers of the static cache that `generate` was given last.

    Only the layers are kept: while the cache itself is alive, somebody may still read it, and the
    next call gets new memory.

    Args:
        renewed: called when steps captured before know memory that will not be used again.
    """

    def __init__(self, renewed: Callable[[], None]) -> None:
        self._renewed = renewed
        self.forget()

    def forget(self) -> None:
        """Let go of the memory."""
        self._cache: Callable[[], Any] = _nobody
        self._layers: list[Any] = []
        self._batch = 0

    def reusing(
        self, prepare: Callable[..., Any], compiles: Callable[[], bool]
    ) -> Callable[..., Any]:
        """
        A function to stand for *prepare*, a model's own ``_prepare_static_cache``.

        Args:
            prepare: makes a new cache.
            compiles: whether steps are compiled, which fewer lengths of caches suit.
        """
        takes = inspect.signature(prepare)

        def reuse(*args: Any, **kwargs: Any) -> Any:
            given = takes.bind(*args, **kwargs)
            batch, length = map(given.arguments.get, ("batch_size", "max_cache_len"))
            if length is not None:
                given.arguments["max_cache_len"] = cache_length(length, compiles())
            fresh = prepare(*given.args, **given.kwargs)
            if type(fresh) is not StaticCache or batch is None:
                return fresh
            if self._fits(fresh, batch):
                fresh.layers = self._layers
            else:
                self._renewed()
            self._cache, self._layers, self._batch = weakref.ref(fresh), fresh.layers, batch
            return fresh

        return reuse

    def _fits(self, fresh: StaticCache, batch: int) -> bool:
        return (
            self._cache() is None
            and batch == self._batch
            and len(self._layers) == len(fresh.layers)
            and all(map(cache_state.empty_for, self._layers, fresh.layers))
        )


def _nobody() -> None:
    """What a weak reference gives whose object is gone."""
