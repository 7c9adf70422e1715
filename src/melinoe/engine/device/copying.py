"""
Copy experts of one layer from host memory into slots: one launch for all missing experts.

The kernel reads the load list that the decide kernel wrote; when it is empty every program ends at
once. Source and target are raw addresses: a GPU reads page-locked host memory over the link.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from melinoe.errors import AttachError
from melinoe.experts.format import Part
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store

# Bytes that one program moves at a time: 128 threads with eight 16-byte loads under way each.
CHUNK_BYTES = 16384
# Programs per multiprocessor; with the chunk, they say how much is under way on the link at once.
PROGRAMS_PER_SM = 4
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}

Block = dict[str, Tensor]


@triton.jit
def _copy(
    address_ptr, chunk_ptr, load_expert_ptr, load_slot_ptr, num_loads_ptr, num_chunks,
    WORD: tl.constexpr, WORDS: tl.constexpr, VECTOR: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    items = tl.load(num_loads_ptr) * num_chunks
    for item in range(tl.program_id(0), items, programs):
        number = item // num_chunks
        chunk = chunk_ptr + (item % num_chunks) * 4
        expert = tl.load(load_expert_ptr + number)
        slot = tl.load(load_slot_ptr + number).to(tl.int64)
        source = tl.load(address_ptr + expert) + tl.load(chunk)
        target = tl.load(chunk + 1) + slot * tl.load(chunk + 2)
        # The hints are what makes a thread load 16 bytes at once.
        count = tl.multiple_of(tl.load(chunk + 3).to(tl.int32), VECTOR)
        offsets = tl.arange(0, WORDS)
        inside = offsets < count
        from_ptr = tl.multiple_of(source.to(tl.pointer_type(WORD)) + offsets, BYTES)
        to_ptr = tl.multiple_of(target.to(tl.pointer_type(WORD)) + offsets, BYTES)
        tl.store(to_ptr, tl.load(from_ptr, mask=inside), mask=inside)


class Loader:
    """
    Loads experts of one layer into slots or a staging block; *where*: `addresses` of the layer.
    """

    def __init__(
        self, store: Store, layer: int, where: Tensor, slots: Mapping[str, Tensor],
        programs: int | None = None, chunk_bytes: int = CHUNK_BYTES,
    ) -> None:  # fmt: skip
        parts = _views_of(store, layer, 0)
        begin = min(part.data_ptr() for part in parts.values())
        rows, sizes = [], [int(where[0])]
        for name, part in parts.items():
            if not slots[name].is_contiguous():
                raise ValueError(f"the slots of {name} are not contiguous")
            offset, base, stride = part.data_ptr() - begin, slots[name].data_ptr(), part.nbytes
            sizes += [offset, base, stride]
            rows += [
                (offset + at, base + at, stride, min(chunk_bytes, stride - at))
                for at in range(0, stride, chunk_bytes)
            ]
        aligned = math.gcd(*sizes, *(where - where[0]).tolist())
        self.word_bytes = math.gcd(aligned, 8)
        self.vector = math.gcd(aligned, 16) // self.word_bytes
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        table[:, 3] //= self.word_bytes
        self._chunks, self._where = table.to(where.device), where
        self._words = chunk_bytes // self.word_bytes
        self._store, self._layer = store, layer
        self.programs = programs or default_programs(where.device)
        self.nbytes = sum(part.nbytes for part in parts.values())
        # They also keep the memory alive whose addresses the table holds.
        self._views = [
            {name: tensor[slot] for name, tensor in slots.items()}
            for slot in range(len(next(iter(slots.values()))))
        ]

    def load_listed(self, experts: Tensor, slots: Tensor, count: Tensor) -> None:
        """Load what int32 lists on the device name, as many as *count*, one element, says."""
        _copy[(self.programs,)](
            self._where, self._chunks, experts, slots, count, self._chunks.shape[0],
            WORD=_WORDS[self.word_bytes], WORDS=self._words, VECTOR=self.vector,
            BYTES=self.vector * self.word_bytes, num_warps=4,
        )  # fmt: skip

    def load(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Load (expert, slot) pairs that the host names, by the copy engine, which is faster."""
        for expert, slot in pairs:
            self._store.read(self._layer, expert, self._views[slot])


def default_programs(device: torch.device) -> int:
    """Number of programs that keeps a link busy; a few in the interpreter, to see them share."""
    if device.type != "cuda":
        return 3
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


# --- what a prompt passes through ----------------------------------------------------------------


class Staging:
    """The staging blocks of a model, shared by layers of one shape, and the copy stream."""

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
        Room for *count* experts, by part, that the allocator reuses after copies to it are done. Of
        zeros: a choice of no expert computes some slot, with weight zero.
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


# --- where blocks lie ---------------------------------------------------------------------------


def _views_of(store: Store, layer: int, expert: int) -> dict[str, Tensor]:
    views = store.views(layer, expert)
    if views is None:
        raise AttachError(
            f"the GPU cannot read experts in a {store.kind} store; leave store out, or give "
            'engine="reference"'
        )
    return views


def addresses(store: Store, layer: int, device: torch.device) -> Tensor:
    """Find where *device* sees each block of *layer*, int64 ``(num_experts,)``, or AttachError."""
    begins = [
        min(view.data_ptr() for view in _views_of(store, layer, expert).values())
        for expert in range(store.num_experts(layer))
    ]
    if device.type == "cuda":
        shift = _device_address(begins[0], device) - begins[0]  # a layer is one allocation
        begins = [begin + shift for begin in begins]
    return torch.tensor(begins, dtype=torch.int64, device=device)


def _device_address(host_address: int, device: torch.device) -> int:
    """Find the address by which a GPU reads page-locked host memory; usually the same."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise AttachError(
            f"the CUDA driver's library cannot be opened ({error}), so the GPU cannot be told "
            'where experts lie in host memory; use engine="reference"'
        ) from error
    found = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context the current one
        code = driver.cuMemHostGetDevicePointer_v2(
            ctypes.byref(found), ctypes.c_void_p(host_address), ctypes.c_uint(0)
        )
    if code != 0:
        raise AttachError(
            f"the GPU cannot read the experts' host memory in place (CUDA error {code}); give "
            'store="pinned", or engine="reference"'
        )
    return int(found.value)
