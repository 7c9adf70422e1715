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


class Constants:
    """What `torch.tensor` made of numbers; kept as long as graphs may read it."""

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
        if func is not torch.tensor or not args or isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        key = (repr(args), repr(sorted(kwargs.items())), torch.is_inference_mode_enabled())
        if self._giving:
            known = self._made.get(key)
            return func(*args, **kwargs) if known is None else known.clone()
        made = func(*args, **kwargs)
        self._made[key] = made.clone()
        return made
