"""
Capture one forward pass in a CUDA graph, and keep away from it what a graph cannot hold.

A pass is captured on input buffers of our own (`buffer`, `fill`), small constants are made before
(`Constants`), and a step that makes the host wait is found while it runs (`waits`).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CudaStep:
    """
    One captured forward pass; every replay overwrites its `output`. A capture that fails leaves the
    process able to capture again. Never use a *pool* again whose graphs are all gone, nor the
    *stream* of another model: what libraries keep may outlive them.
    """

    def __init__(self, run: Callable[[], Any], pool: Any, stream: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with uncollected(), torch.cuda.stream(stream):
            self._graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                self.output = run()
            except BaseException:
                with suppress(RuntimeError):  # what *run* raised says more than what this raises
                    self._end(pool, stream)
                raise
            self._end(pool, stream)

    def replay(self) -> None:
        """Run the pass on what its buffers hold now: one launch."""
        self._graph.replay()

    def _end(self, pool: Any, stream: Any) -> None:
        try:
            self._graph.capture_end()
        except BaseException:
            _mend_after_failed_capture(stream.device_index, pool)
            raise


def _mend_after_failed_capture(device: int, pool: Any) -> None:
    """
    Make memory and random numbers usable again after ``capture_end`` raised: until torch 2.12 it
    raises before it tells the allocator that the capture is over (pytorch#180395), until 2.14 it
    keeps its hold on the pool's memory (pytorch#190308).
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 12):
        with suppress(RuntimeError):  # raises if the capture was over for the allocator
            torch._C._cuda_endAllocateToPool(device, pool)
    if version < (2, 14):
        torch._C._cuda_releasePool(device, pool)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the body: to release page-locked memory waits for the device."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def cause(error: BaseException) -> BaseException:
    """Find the first error of a failed capture: ending the capture raises another on top."""
    while error.__context__ is not None and "captur" in str(error):
        error = error.__context__
    return error


def first_line(error: BaseException) -> str:
    """Cut the trace that some libraries put into a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- inputs -------------------------------------------------------------------------------------


def signature(value: Any) -> tuple | None:
    """Describe an input by what a captured step relies on; None for a type that is not known."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device)
    if value is None or isinstance(value, bool | int | float | str):
        return ("value", value)
    if isinstance(value, dict) and all(v is None or isinstance(v, Tensor) for v in value.values()):
        return tuple((name, signature(value[name])) for name in sorted(value))
    return None


def buffer(value: Any) -> Any:
    """Copy the tensors of an input into memory that a captured step may read for good."""
    if isinstance(value, dict):
        return {name: buffer(one) for name, one in value.items()}
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False), torch.no_grad():
        return value.clone(memory_format=torch.contiguous_format)


def fill(buffers: Any, inputs: Mapping[str, Any]) -> None:
    """Copy the tensors of *inputs* into *buffers*, made of inputs of the same kind."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            buffers[name].copy_(value)
        elif isinstance(value, dict):
            fill(buffers[name], value)


class Constants:
    """
    Small tensors that a model makes of Python's numbers in every step, made once: copies from the
    host, which a CUDA graph cannot hold. A captured step (`giving`) gets copies of what a step that
    ran as it was made (`learning`). Never moved or freed, since graphs know where they lie.
    """

    def __init__(self) -> None:
        self._made: dict[tuple, Tensor] = {}

    def learning(self) -> TorchFunctionMode:
        """Remember in the body what ``torch.tensor`` makes."""
        return _Watch(self._made, giving=False)

    def giving(self) -> TorchFunctionMode:
        """Return copies of what was made before; what is new is made as ever."""
        return _Watch(self._made, giving=True)


class _Watch(TorchFunctionMode):
    def __init__(self, made: dict[tuple, Tensor], giving: bool) -> None:
        super().__init__()
        self._made, self._giving = made, giving

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or len(args) != 1 or not _is_plain(args[0]):
            return func(*args, **kwargs)
        key = (repr(args), repr(sorted(kwargs.items())), torch.is_inference_mode_enabled())
        if self._giving and key in self._made:
            return self._made[key].clone()
        if self._giving:
            return func(*args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it waits, and a captured step is given what it made
            made = func(*args, **kwargs)
        self._made.setdefault(key, made.clone())
        return made


def _is_plain(value: Any) -> bool:
    """Tell whether *value* is a number, or a short list of numbers, which `repr` tells apart."""
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(map(_is_plain, value))
    return isinstance(value, bool | int | float)


# --- waits --------------------------------------------------------------------------------------


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """
    List, after the body, the calls that made the host wait, as ``file.py:line``; not every one.
    """
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found += calls_that_wait(caught)


def calls_that_wait(caught: list[warnings.WarningMessage]) -> list[str]:
    """Name the calls that waited; other warnings are passed on."""
    found = []
    for one in caught:
        if "called a synchronizing CUDA operation" in str(one.message):
            found.append(f"{Path(one.filename).name}:{one.lineno}")
        elif "synchronization debug mode" not in str(one.message).lower():
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return found
