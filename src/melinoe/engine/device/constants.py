"""
Small tensors that a model makes of Python's numbers in every step, made once.

``torch.tensor([-1], device="cuda")`` copies from the host, which a CUDA graph cannot hold. What
such calls made in a step that ran as it is, a captured step is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from melinoe.engine.device.waits import unwatched


class Constants:
    """What `torch.tensor` made of numbers; kept for good, since graphs know where it lies."""

    def __init__(self) -> None:
        self._made: dict[tuple, Tensor] = {}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """In the body, remember what is made."""
        with _Watch(self._made, giving=False):
            yield

    @contextmanager
    def giving(self) -> Iterator[None]:
        """In the body, give copies of what was made before; what is new is made as ever."""
        with _Watch(self._made, giving=True):
            yield


class _Watch(TorchFunctionMode):
    def __init__(self, made: dict[tuple, Tensor], giving: bool) -> None:
        super().__init__()
        self._made, self._giving = made, giving

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or len(args) != 1 or not _is_plain(args[0]):
            return func(*args, **kwargs)
        key = (repr(args), repr(sorted(kwargs.items())), torch.is_inference_mode_enabled())
        if self._giving:
            known = self._made.get(key)
            return func(*args, **kwargs) if known is None else known.clone()
        with unwatched():  # it waits, but a captured step will be given it
            made = func(*args, **kwargs)
        if key not in self._made:  # the first stays: graphs know where it lies
            self._made[key] = made.clone()
        return made


def _is_plain(value: Any) -> bool:
    """A number, or numbers in lists, which `repr` tells apart."""
    if isinstance(value, list | tuple):
        return len(value) <= _MOST and all(map(_is_plain, value))
    return isinstance(value, bool | int | float)


_MOST = 64
