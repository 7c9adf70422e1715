"""One captured forward pass: a CUDA graph, or the same without CUDA."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch


class Step(Protocol):
    """One captured forward pass."""

    output: Any

    def replay(self) -> None:
        """Run it again, on what its input buffers hold now."""


class CudaStep:
    """
    Capture a forward pass in a CUDA graph.

    A capture that fails leaves the process as it was: the stream is the caller's again, and memory
    and random numbers can be captured anew.

    Args:
        run: the pass; nothing of it is executed now.
        pool: memory shared by graphs that live together. A pool whose graphs are all gone must not
            be used again: what libraries keep in it may outlive them.
        stream: to capture on; not that of another model, whose graphs may go while ours stay.
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
        """One launch."""
        self._graph.replay()

    def _end(self, pool: Any, stream: Any) -> None:
        try:
            self._graph.capture_end()
        except BaseException:
            mend_after_failed_capture(stream.device_index, pool)
            raise


def mend_after_failed_capture(device: int, pool: Any) -> None:
    """
    Let memory and random numbers be used as before, after ``capture_end`` raised.

    Until torch 2.12 it raises before it tells the allocator that the capture is over: every later
    capture fails, and memory that other streams used is never given back (pytorch#180395). The
    random generator goes on expecting a capture, and refuses to sample. Until torch 2.14 the
    capture also keeps its hold on the pool's memory (pytorch#190308).

    Args:
        device: index of the GPU that was captured on.
        pool: the capture's memory pool.
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
    """
    In the body Python collects no garbage, as CUDA captures a graph there.

    What is collected may be a store of page-locked memory, which waits for the device before it
    lets go; while a stream is captured that is an error, and the capture is lost.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class PlainStep:
    """The same where there is no CUDA: the pass is run each time, on the same buffers."""

    def __init__(self, run: Callable[[], Any], pool: Any, stream: Any) -> None:
        self._run = run
        self.output: Any = None

    def replay(self) -> None:
        """Run the pass."""
        self.output = self._run()
