"""Two blocks of GPU memory that a prompt's experts pass through, and the stream that fills them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store


class Staging:
    """
    The staging blocks of a model, shared by all layers of the same shape, and the copy stream.

    Args:
        device: where they are.
        experts: that one block holds.
    """

    def __init__(self, device: torch.device, experts: int) -> None:
        self.experts = experts
        self._device = device
        self._blocks: dict[tuple, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def blocks(
        self, layer: ExpertsLayer, store: Store
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The two blocks for *layer*; each maps names to tensors ``(experts, ...)``."""
        key = layer.tensors, store.format(layer.index).exact
        if key not in self._blocks:
            self._blocks[key] = (self._block(layer, store), self._block(layer, store))
        return self._blocks[key]

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
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            yield

    def arrive(self) -> None:
        """Let the computation wait for all copies issued so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def mark(self) -> Any:
        """Mark what the computation has queued so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def adopt(self, *tensors: Tensor) -> None:
        """Keep the allocator from reusing the memory of *tensors* before a copy to it is done."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)

    def release(self) -> None:
        """Free the blocks."""
        self._blocks.clear()

    def finish(self) -> None:
        """Wait until no copy is under way."""
        if self._stream is not None:
            self._stream.synchronize()

    def _block(self, layer: ExpertsLayer, store: Store) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            block = unpacked_slots(layer, store, self.experts, self._device)
        self.adopt(*block.values())
        return block


def unpacked_slots(
    layer: ExpertsLayer, store: Store, count: int, device: torch.device
) -> dict[str, Tensor]:
    """Slots for the module's tensors; where blocks are unpacked, matrices lie as in the block."""
    slots = {}
    for tensor in layer.tensors:
        turned = tensor.transposed and not store.format(layer.index).exact
        shape = tensor.rows_columns if turned else tensor.shape
        slot = torch.zeros((count, *shape), dtype=tensor.dtype, device=device)
        slots[tensor.name] = slot.transpose(1, 2) if turned else slot
    return slots


def staging_bytes(layers: Sequence[ExpertsLayer], experts: int) -> int:
    """Bytes of the two blocks for each distinct shape among *layers*."""
    return sum(
        2 * experts * sum(tensor.nbytes for tensor in tensors)
        for tensors in {layer.tensors for layer in layers}
    )
