"""
Copy missing experts that are stored as int8 or int4: they are unpacked as they enter their slots.

The same work as `device.copying`, but the link carries codes, scales and minimums. Biases are
copied as they are, in the same launch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from melinoe.engine.device.copying import Segment, default_programs
from melinoe.experts.format import Part
from melinoe.experts.integer import Integer

# Weights that one program unpacks at a time.
CHUNK_WEIGHTS = 8192
# Weights of a bias that one program copies at a time.
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
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    RAW: tl.constexpr,
):
    programs = tl.num_programs(0)
    items = tl.load(num_loads_ptr) * num_chunks
    group = tl.arange(0, GROUPS)
    for item in range(tl.program_id(0), items, programs):
        number = item // num_chunks
        chunk = chunk_ptr + (item % num_chunks) * 8
        block = tl.load(address_ptr + tl.load(load_expert_ptr + number))
        slot = tl.load(load_slot_ptr + number).to(tl.int64)
        source = block + tl.load(chunk + 1)
        target = tl.load(chunk + 4) + slot * tl.load(chunk + 5)
        count = tl.load(chunk + 6).to(tl.int32)
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
            # Several groups of the launch may share a scale: other matrices have shorter groups.
            shared = (tl.load(chunk + 7).to(tl.int32) + group) // tl.load(chunk).to(tl.int32)
            scale_ptr = (block + tl.load(chunk + 2)).to(tl.pointer_type(tl.float16)) + shared
            least_ptr = (block + tl.load(chunk + 3)).to(tl.pointer_type(tl.float16)) + shared
            code_ptr = source.to(tl.pointer_type(tl.uint8))
            # Codes and scales are asked for before either is used: one way over the link.
            BYTES: tl.constexpr = GROUP * BITS // 8
            at = group[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
            from_ptr = tl.multiple_of(code_ptr + at, (1, 16 if BYTES >= 16 else BYTES))
            code = tl.load(from_ptr, mask=inside[:, None], other=0)
            scale = tl.load(scale_ptr, mask=inside, other=0).to(tl.float32)[:, None]
            least = tl.load(least_ptr, mask=inside, other=0).to(tl.float32)[:, None]
            if BITS == 8:
                value = code.to(tl.float32) * scale + least
            else:
                low = (code & 15).to(tl.float32) * scale + least
                high = (code >> 4).to(tl.float32) * scale + least
                value = tl.interleave(low, high)
            into = to_ptr + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            into = tl.multiple_of(into, (1, 16))
            tl.store(into, _narrow(value, TYPE, BF16), mask=inside[:, None])


class ExpandPlan:
    """
    How experts of one layer get from packed blocks into one set of slots.

    Args:
        addresses: int64 ``(num_experts,)``, on the device; multiples of 64.
        segments: The parts of a block; offsets are multiples of 64.
        stored: Their format.
        tensors: The tensors of an expert, as its module has them.
        slots: Per tensor, ``(num_slots, ...)`` on the device, matrices by rows of their output.
        programs: As in `CopyPlan`.
    """

    def __init__(
        self,
        addresses: Tensor,
        segments: Sequence[Segment],
        stored: Integer,
        tensors: Sequence[Part],
        slots: Mapping[str, Tensor],
        programs: int | None = None,
        chunk_weights: int = CHUNK_WEIGHTS,
    ) -> None:
        kinds = {slots[tensor.name].dtype for tensor in tensors}
        if len(kinds) != 1 or not kinds <= set(_TYPES):
            raise ValueError(f"slots of one type in {sorted(map(str, _TYPES))} are needed: {kinds}")
        dtype = kinds.pop()
        part_at = {segment.name: segment.offset for segment in segments}
        groups = {
            tensor.name: stored.arithmetic(tensor.rows_columns[1]).group
            for tensor in tensors
            if tensor.is_matrix
        }
        self._group = min(groups.values())
        step = chunk_weights // self._group
        rows = []
        for tensor in tensors:
            target = slots[tensor.name]
            if tensor.transposed:
                target = target.transpose(1, 2)
            if not target.is_contiguous():
                raise ValueError(f"the slots of {tensor.name} do not lie by rows of their output")
            base, numel = target.data_ptr(), math.prod(tensor.shape)
            stride = numel * dtype.itemsize
            if not tensor.is_matrix:
                rows.append((0, part_at[tensor.name], 0, 0, base, stride, numel, 0))
                continue
            codes, scales, minimums = (
                part_at[f"{tensor.name}.{kind}"] for kind in ("codes", "scales", "minimums")
            )
            shared = groups[tensor.name] // self._group
            for first in range(0, numel // self._group, step):
                count = min(step, numel // self._group - first)
                weights = first * self._group
                rows.append(
                    (shared, codes + weights * stored.bits // 8, scales, minimums,
                     base + weights * dtype.itemsize, stride, count, first)
                )  # fmt: skip
        self._chunks = torch.tensor(rows, dtype=torch.int64, device="cpu").to(addresses.device)
        self._addresses = addresses
        self._bits, self._type, self._groups = stored.bits, _TYPES[dtype], step
        self._keep = dict(slots)
        self.programs = programs or default_programs(addresses.device)
        self.nbytes = sum(segment.nbytes for segment in segments)

    def launch(self, load_expert: Tensor, load_slot: Tensor, num_loads: Tensor) -> None:
        """Unpack the listed experts into slots; arguments as for `CopyPlan.launch`."""
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
            GROUP=self._group,
            GROUPS=self._groups,
            RAW=RAW_WEIGHTS,
            num_warps=4,
        )
