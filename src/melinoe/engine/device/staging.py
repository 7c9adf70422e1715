"""Two blocks of GPU memory that a prompt's experts pass through, and the stream that fills them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from melinoe.experts.format import Part
from melinoe.moe.experts import ExpertsLayer

Block = dict[str, Tensor]


class Staging:
    """
    The staging blocks of a model, *experts* in each, shared by all layers of the same shape; and
    the copy stream.
    """

    def __init__(self, device: torch.device, experts: int) -> None:
        self.experts = experts
        self._device = device
        self._blocks: dict[tuple[Part, ...], tuple[Block, Block]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def blocks(self, layer: ExpertsLayer) -> tuple[Block, Block]:
        """The two blocks for *layer*, by part, ``(experts, ...)``."""
        if layer.parts not in self._blocks:
            two = self.slots(layer, self.experts), self.slots(layer, self.experts)
            self._blocks[layer.parts] = two
        return self._blocks[layer.parts]

    def slots(self, layer: ExpertsLayer, count: int) -> Block:
        """
        Room for *count* experts, by part, that the allocator reuses after copies to it are done.

        Of zeros: a choice of no expert computes some slot, with weight zero.
        """
        with torch.inference_mode(False):
            found = {
                part.name: torch.zeros((count, *part.shape), dtype=part.dtype, device=self._device)
                for part in layer.parts
            }
        if self._stream is not None:
            for tensor in found.values():
                tensor.record_stream(self._stream)
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(t.nbytes for pair in self._blocks.values() for b in pair for t in b.values())

    def begin(self) -> None:
        """Let the copies to come wait for what the computation has queued so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def copying(self, after: Any = None) -> Iterator[None]:
        """Issue copies in the body that wait for *after*, an earlier `mark`."""
        with torch.cuda.stream(self._stream):
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            yield

    def arrive(self) -> None:
        """Let the computation wait for all copies issued so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def mark(self) -> Any:
        """Mark what the computation has queued so far."""
        if self._stream is not None:
            return torch.cuda.current_stream(self._device).record_event()
        return None

    def release(self) -> None:
        """Free the blocks."""
        self._blocks.clear()

    def finish(self) -> None:
        """Wait until no copy is under way."""
        if self._stream is not None:
            self._stream.synchronize()


def staging_bytes(layers: Sequence[ExpertsLayer], experts: int) -> int:
    """Bytes of the two blocks for each distinct shape among *layers*."""
    shapes = {layer.parts: layer.block_bytes for layer in layers}
    return 2 * experts * sum(shapes.values())
