"""
Copy missing experts into their slots: one launch for all of a layer's tensors and misses.

The kernel reads the load list that the decide kernel wrote, so the host does not know what is
copied; when the list is empty every program ends at once. Source and target are raw addresses: the
source may be page-locked host memory, which a GPU reads over the link.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes that one program moves at a time: 128 threads with eight 16-byte loads under way each.
CHUNK_BYTES = 16384
# Programs per multiprocessor; with the chunk, they say how much is under way on the link at once.
# The usual number: `melinoe.engine.device.tuning` tries others.
PROGRAMS_PER_SM = 4
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


@triton.jit
def _copy(
    address_ptr,
    chunk_ptr,
    load_expert_ptr,
    load_slot_ptr,
    num_loads_ptr,
    num_chunks,
    WORD: tl.constexpr,
    WORDS: tl.constexpr,
    VECTOR: tl.constexpr,
    BYTES: tl.constexpr,
):
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


@dataclass(frozen=True)
class Segment:
    """One tensor of an expert's block: its *offset* and *nbytes*, in bytes."""

    name: str
    offset: int
    nbytes: int


class CopyPlan:
    """
    How experts of one layer get from their blocks into one set of slots.

    Args:
        addresses: int64 ``(num_experts,)``, on the device: where each expert's block begins, as
            the device sees it.
        segments: the tensors of a block.
        slots: per name, a contiguous tensor ``(num_slots, ...)`` on the device.
        programs: how many copy at once; absent means as many as the device runs at once.
    """

    def __init__(
        self,
        addresses: Tensor,
        segments: Sequence[Segment],
        slots: Mapping[str, Tensor],
        programs: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        rows = []
        sizes = [int(addresses[0]) if len(addresses) else 0]
        for segment in segments:
            target = slots[segment.name]
            if not target.is_contiguous():
                raise ValueError(f"the slots of {segment.name} are not contiguous")
            base, stride = target.data_ptr(), segment.nbytes
            sizes += [segment.offset, base, stride]
            for start in range(0, stride, chunk_bytes):
                length = min(chunk_bytes, stride - start)
                rows.append((segment.offset + start, base + start, stride, length))
        sizes += (addresses - addresses[0]).tolist()
        aligned = math.gcd(*sizes)
        size = math.gcd(aligned, 8)
        self._word, self._size = _WORDS[size], size
        self._vector = math.gcd(aligned, 16) // size
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        table[:, 3] //= size
        self._chunks = table.to(addresses.device)
        self._addresses = addresses
        self._words = chunk_bytes // size
        self._keep = dict(slots)  # the table holds their addresses, which must stay theirs
        self.programs = programs or default_programs(addresses.device)
        self.nbytes = sum(segment.nbytes for segment in segments)

    def launch(self, load_expert: Tensor, load_slot: Tensor, num_loads: Tensor) -> None:
        """
        Copy the listed experts, in the order of the current stream.

        Args:
            load_expert: int32 ``(n,)``, on the device.
            load_slot: int32 ``(n,)``, on the device; no slot twice.
            num_loads: int32, one element: how many entries of the lists hold.
        """
        _copy[(self.programs,)](
            self._addresses,
            self._chunks,
            load_expert,
            load_slot,
            num_loads,
            self._chunks.shape[0],
            WORD=self._word,
            WORDS=self._words,
            VECTOR=self._vector,
            BYTES=self._vector * self._size,
            num_warps=4,
        )


def default_programs(device: torch.device) -> int:
    """Number of programs that keeps a link busy; a few in the interpreter, to see them share."""
    if device.type != "cuda":
        return 3
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
