"""Experts in host memory: every expert one contiguous block, pageable or pinned."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Self

import torch
from torch import Tensor

from melinoe.errors import AttachError, BudgetError, PinError
from melinoe.host_memory import format_bytes
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store
from melinoe.stores.weights import free_weights, give_weights_back, weights_of

# Each tensor of a block begins at a multiple of this: a cache line, and wide enough for any copy.
_ALIGNMENT = 64


class RamStore(Store):
    """All experts in pageable host memory, filled through `views`, or by `from_modules`."""

    kind = "ram"

    def __init__(self, layers: Sequence[ExpertsLayer] = (), file: str | None = None) -> None:
        super().__init__()
        self._file, self._filled = file, 0
        self._blocks: list[Tensor] = []  # per layer: uint8 (num_experts, stride)
        self._views: list[dict[str, Tensor]] = []
        for layer in layers:
            self._add(layer)

    @classmethod
    def from_modules(cls, layers: Sequence[ExpertsLayer]) -> Self:
        """
        Move the weights of *layers* out of their modules, one layer at a time.

        A layer's stacked parameters are freed before the next is read, so that only one layer
        exists twice; packed ones at the end, since what was rounded could not be given back. Should
        it fail every module has its weights as before.
        """
        store, exact = cls(), all(layer.format.exact for layer in layers)
        last = {id(p): at for at, layer in enumerate(layers) for p in weights_of(layer).values()}
        copied = 0  # a layer that was copied half-way still has its weights, and keeps them
        try:
            for at, layer in enumerate(layers):
                store._add(layer)
                own = weights_of(layer)
                for expert in range(layer.num_experts):
                    weights = {name: stack[expert].cpu() for name, stack in own.items()}
                    store.write(at, expert, layer.format.encode(layer.tensors, weights))
                copied = at + 1
                # Weights that a later layer shares are needed until that layer has been read.
                if exact and all(last[id(p)] == at for p in own.values()):
                    free_weights(layer)
        except BaseException:
            for layer in layers[:copied] if exact else ():
                give_weights_back(layer, store)
            raise
        for layer in () if exact else layers:
            free_weights(layer)
        return store

    @property
    def host_bytes(self) -> int:  # type: ignore[override]
        """Bytes of all blocks, with the padding between their tensors."""
        return sum(blocks.numel() for blocks in self._blocks)

    def views(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One block by part, where it lies; write to fill it."""
        return {name: stack[expert] for name, stack in self._views[layer].items()}

    def write(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy *tensors*, named and shaped as `views` gives them, into one block."""
        for name, stack in self._views[layer].items():
            stack[expert].copy_(tensors[name])

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """Copy one block into *into*; from pinned memory to a GPU in the order of its stream."""
        for name, stack in self._views[layer].items():
            into[name].copy_(stack[expert], non_blocking=self.kind == "pinned")

    def _add(self, layer: ExpertsLayer) -> None:
        """Make room for one more layer."""
        offsets, stride = [], 0
        for part in layer.parts:
            offsets.append(stride)
            stride += -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT
        blocks = self._allocate(layer.num_experts, stride)
        views = {}
        for offset, part in zip(offsets, layer.parts, strict=True):
            flat = blocks[:, offset : offset + part.nbytes].view(part.dtype)
            views[part.name] = flat.unflatten(1, part.shape) if part.shape else flat[:, 0]
        self._blocks.append(blocks)
        self._views.append(views)
        self._layers.append(layer)

    def _allocate(self, num_experts: int, stride: int) -> Tensor:
        if self._file is not None:
            start, size = self._filled, num_experts * stride
            self._filled += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            room = torch.from_file(self._file, shared=True, size=self._filled, dtype=torch.uint8)
            return room[start : start + size].view(num_experts, stride)
        try:
            # Never inference tensors: they could not be filled or read outside inference mode.
            with torch.inference_mode(False):
                return torch.empty((num_experts, stride), dtype=torch.uint8, device="cpu")
        except RuntimeError as error:
            raise BudgetError(
                f"the host has no room for {format_bytes(num_experts * stride)} of experts after "
                f"{format_bytes(self.host_bytes)}; free some, or load a checkpoint that has them "
                "in this format with store='disk'"
            ) from error


class PinnedStore(RamStore):
    """
    All experts in page-locked host memory, from which a GPU copies without a detour. It is locked
    in place, by whole pages; torch's pinned allocator rounds up to a power of two. AttachError: no
    CUDA device. PinError: the system refuses to lock that much.
    """

    kind = "pinned"

    def __init__(self, layers: Sequence[ExpertsLayer] = (), file: str | None = None) -> None:
        if not torch.cuda.is_available():
            raise AttachError(
                'pinned memory needs a CUDA device and this machine has none; choose store="ram"'
            )
        torch.cuda.init()
        super().__init__(layers, file)

    def _allocate(self, num_experts: int, stride: int) -> Tensor:
        size = num_experts * stride
        whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        room = super()._allocate(1, whole + mmap.PAGESIZE)[0]
        first = -room.data_ptr() % mmap.PAGESIZE
        # A GPU that reads 20 GiB through pages of 4 KiB is reported to lose a third of the link's
        # rate (nvbandwidth#42). A refusal costs speed alone, so none is heard.
        with suppress(OSError, AttributeError):
            start, length = ctypes.c_void_p(room.data_ptr() + first), ctypes.c_size_t(whole)
            ctypes.CDLL(None).madvise(start, length, mmap.MADV_HUGEPAGE)
        # All threads bring the pages in; locking pages that are not there yet takes one thread.
        room[:: mmap.PAGESIZE] += 0  # and what another process has filled stays
        blocks = room[first : first + size].view(num_experts, stride)
        address = blocks.data_ptr()
        code = torch.cuda.cudart().cudaHostRegister(address, whole, 0)
        if int(code) != 0:
            _forget_error()
            raise PinError(
                f"the system refuses to pin {format_bytes(size)} after "
                f"{format_bytes(self.host_bytes)} (CUDA error {int(code)}); raise the limit on "
                'locked memory (ulimit -l) or choose store="ram"'
            )
        # The storage, not the tensor: views of it may outlive the tensor object.
        weakref.finalize(blocks.untyped_storage(), _unpin, address)
        return blocks


def _forget_error() -> None:
    """CUDA keeps a call's error for whoever asks next, which is torch after its next kernel."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # a copy may still read the block
    torch.cuda.cudart().cudaHostUnregister(address)
