"""One captured forward pass: a CUDA graph, or the same without CUDA."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Step(Protocol):
    """One captured forward pass."""

    output: Any

    def replay(self) -> None:
        """Run it again, on what its input buffers hold now."""


class CudaStep:
    """
    A forward pass in a CUDA graph.

    Args:
        run: the pass; nothing of it is executed now.
        pool: memory shared by graphs that live together. A pool whose graphs are all gone must not
            be used again: what libraries keep in it may outlive them.
        stream: to capture on; not that of another model, whose graphs may go while ours stay.
    """

    def __init__(self, run: Callable[[], Any], pool: Any, stream: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        with uncollected(), capture:
            self.output = run()

    def replay(self) -> None:
        """One launch."""
        self._graph.replay()


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
