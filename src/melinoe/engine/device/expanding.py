"""
Copy missing experts that are stored in codes: they are expanded as they are written into slots.

The same work as `device.copying`, but the link carries codes, scales and minima. Tensors that are
not stored in codes (biases) are copied as they are, in the same launch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from melinoe.engine.device.copying import default_programs
from melinoe.engine.device.quantize import GROUP

# Groups that one program expands at a time.
CHUNK_GROUPS = 128
# Weights without codes that one program copies at a time.
RAW_WEIGHTS = 1024
_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


@triton.jit
def _narrow(value, TYPE: tl.constexpr, BF16: tl.constexpr):
    if BF16:
        # To the nearest, ties to even, in integers: the interpreter's own cast rounds otherwise.
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(TYPE)


@triton.jit
def _scale_and_least(pair):
    # Little-endian: the scale is the lower half of the word.
    scale = pair.to(tl.int16).to(tl.float16, bitcast=True)
    least = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32)[:, None], least.to(tl.float32)[:, None]


@triton.jit
def _expand(
    address_ptr,
    chunk_ptr,
    load_expert_ptr,
    load_slot_ptr,
    num_loads_ptr,
    num_chunks,
    TYPE: tl.constexpr,
    BF16: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    RAW: tl.constexpr,
):
    programs = tl.num_programs(0)
    items = tl.load(num_loads_ptr) * num_chunks
    group = tl.arange(0, GROUPS)
    for item in range(tl.program_id(0), items, programs):
        number = item // num_chunks
        chunk = chunk_ptr + (item % num_chunks) * 6
        block = tl.load(address_ptr + tl.load(load_expert_ptr + number))
        slot = tl.load(load_slot_ptr + number).to(tl.int64)
        source = block + tl.load(chunk + 1)
        target = tl.load(chunk + 3) + slot * tl.load(chunk + 4)
        count = tl.load(chunk + 5).to(tl.int32)
        to_ptr = target.to(tl.pointer_type(TYPE))
        if tl.load(chunk) == 0:
            # Biases, whose slots begin anywhere: a few at a time, so that registers are left.
            raw_ptr = source.to(tl.pointer_type(TYPE))
            for start in range(0, count, RAW):
                offsets = start + tl.arange(0, RAW)
                raw = tl.load(raw_ptr + offsets, mask=offsets < count)
                tl.store(to_ptr + offsets, raw, mask=offsets < count)
        else:
            inside = group < count
            pair_ptr = (block + tl.load(chunk + 2)).to(tl.pointer_type(tl.int32))
            code_ptr = source.to(tl.pointer_type(tl.uint8))
            # Codes and pairs are both asked for before either is used: one way over the link.
            if BITS == 8:
                column = tl.arange(0, 64)[None, :]
                at = group[:, None] * 64 + column
                from_ptr = tl.multiple_of(code_ptr + at, (1, 16))
                code = tl.load(from_ptr, mask=inside[:, None], other=0)
                scale, least = _scale_and_least(tl.load(pair_ptr + group, mask=inside, other=0))
                value = code.to(tl.float32) * scale + least
                into = tl.multiple_of(to_ptr + at, (1, 16))
                tl.store(into, _narrow(value, TYPE, BF16), mask=inside[:, None])
            else:
                # A byte holds two weights that lie 32 apart, so that both halves are written wide.
                column = tl.arange(0, 32)[None, :]
                from_ptr = tl.multiple_of(code_ptr + group[:, None] * 32 + column, (1, 16))
                code = tl.load(from_ptr, mask=inside[:, None], other=0)
                scale, least = _scale_and_least(tl.load(pair_ptr + group, mask=inside, other=0))
                low = (code & 15).to(tl.float32) * scale + least
                high = (code >> 4).to(tl.float32) * scale + least
                into = tl.multiple_of(to_ptr + group[:, None] * 64 + column, (1, 16))
                tl.store(into, _narrow(low, TYPE, BF16), mask=inside[:, None])
                tl.store(into + 32, _narrow(high, TYPE, BF16), mask=inside[:, None])


@dataclass(frozen=True)
class Section:
    """
    One tensor in a block of codes.

    Attributes:
        name: of the parameter.
        numel: weights.
        offset: of its codes, or of its weights if it has no codes, in bytes.
        scales: offset of its float16 pairs (scale, minimum), one a group; None without codes.
    """

    name: str
    numel: int
    offset: int
    scales: int | None


class ExpandPlan:
    """
    How experts of one layer get from blocks of codes into one set of slots.

    Args:
        addresses: int64 ``(num_experts,)``, on the device; multiples of 64.
        sections: the tensors of a block; offsets are multiples of 64.
        bits: of the codes, 8 or 4.
        slots: per name, a contiguous tensor ``(num_slots, ...)`` on the device.
        programs: as in `CopyPlan`.
    """

    def __init__(
        self,
        addresses: Tensor,
        sections: Sequence[Section],
        bits: int,
        slots: Mapping[str, Tensor],
        programs: int | None = None,
        chunk_groups: int = CHUNK_GROUPS,
    ) -> None:
        rows = []
        kinds = {slots[section.name].dtype for section in sections}
        if len(kinds) != 1 or not kinds <= set(_TYPES):
            raise ValueError(f"slots of one type in {sorted(map(str, _TYPES))} are needed: {kinds}")
        dtype = kinds.pop()
        for section in sections:
            target = slots[section.name]
            if not target.is_contiguous():
                raise ValueError(f"the slots of {section.name} are not contiguous")
            base, stride = target.data_ptr(), section.numel * dtype.itemsize
            step = chunk_groups * GROUP
            for start in range(0, section.numel, step):
                left = min(step, section.numel - start)
                into = base + start * dtype.itemsize
                if section.scales is None:
                    at = section.offset + start * dtype.itemsize
                    rows.append((0, at, 0, into, stride, left))
                else:
                    at = section.offset + start * bits // 8
                    scales = section.scales + start // GROUP * 4
                    rows.append((1, at, scales, into, stride, left // GROUP))
        self._chunks = torch.tensor(rows, dtype=torch.int64, device="cpu").to(addresses.device)
        self._addresses = addresses
        self._bits, self._type, self._groups = bits, _TYPES[dtype], chunk_groups
        self._keep = dict(slots)
        self.programs = programs or default_programs(addresses.device)
        self.nbytes = sum(
            s.numel * dtype.itemsize if s.scales is None else s.numel * bits // 8 + s.numel // 16
            for s in sections
        )

    def launch(self, load_expert: Tensor, load_slot: Tensor, num_loads: Tensor) -> None:
        """As `CopyPlan.launch`."""
        _expand[(self.programs,)](
            self._addresses,
            self._chunks,
            load_expert,
            load_slot,
            num_loads,
            self._chunks.shape[0],
            TYPE=self._type,
            BF16=self._type == tl.bfloat16,
            BITS=self._bits,
            GROUPS=self._groups,
            RAW=RAW_WEIGHTS,
            num_warps=4,
        )
