"""
Compute experts from slots that hold blocks, by three launches that never ask the host.

One multiplies (token, choice) pairs with gate and up, one with down, one adds up each token's
pairs. A program takes up to 16 pairs that share a slot, and some rows; it decodes by integer
operations and adds up in float32, group after group, so a pair's bits depend neither on the slot
nor on other pairs. Codes are exact in bfloat16 and float16; a group's scale is multiplied once, in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from transformers.integrations.moe import _default_apply_gate

from melinoe.experts.format import Arithmetic, ExpertFormat, PackedFormat
from melinoe.moe.experts import ExpertsLayer

# Pairs that one program computes: the least that tensor cores multiply.
_ROWS = tl.constexpr(16)
# Up to so many pairs each program finds its own; of more, a table is made before.
FEW_PAIRS = 128
# Rows of a projection that one program computes; columns at a time where there are no groups.
OUTPUTS, _COLUMNS = 32, 64
WARPS, STAGES = 4, 4
_BLOCK = 512  # columns of a token's sum
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Activations, by transformers' class, that the kernel applies itself.
_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu",
                "GELUTanh": "gelu_tanh"}  # fmt: skip


@triton.jit
def _decode(code, CODES: tl.constexpr, TYPE: tl.constexpr):
    """Turn codes into the numbers they stand for, exactly."""
    code = code.to(tl.int32)
    if CODES == "e4m3":
        bits = (code & 0x80) << 24 | (code & 0x7F) << 20
        value = bits.to(tl.float32, bitcast=True) * (2.0**120)
    elif CODES == "e2m1":
        # Twice a level is one of 0 1 2 3 4 6 8 12: half a unit of the last place of 2**22.
        level = (-0x379BCDF0 >> ((code & 7) * 4)) & 15
        value = (level | 0x4A800000).to(tl.float32, bitcast=True) - 4194304.0
        value = (value.to(tl.int32, bitcast=True) | (code & 8) << 28).to(tl.float32, bitcast=True)
    elif CODES == "levels":
        # Of a code or its mirror, one of 6 18 30 44 and 59 77 97 120, a byte each.
        at = tl.where(code > 7, code - 8, 7 - code)
        level = (tl.where(at > 3, 0x78614D3B, 0x2C1E1206) >> ((at & 3) * 8)) & 255
        value = (level | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        value = tl.where(code > 7, value, -value)
    else:
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return value.to(TYPE)


@triton.jit
def _narrow(value, TYPE: tl.constexpr):
    if tl.bfloat16 == TYPE:
        # To the nearest, ties to even, in integers: the interpreter's own cast rounds otherwise.
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(TYPE)


@triton.jit
def _load_affine(scale_ptr, offset_ptr, at, held, OFFSET: tl.constexpr, HALF: tl.constexpr):
    """Read what a group's codes are multiplied with, and what is added to each of its weights."""
    if OFFSET == "raw":
        return 0.0, 0.0
    else:
        scale = tl.load(scale_ptr + at, mask=held, other=0)
        if scale_ptr.dtype.element_ty == tl.uint8:  # exponents of two
            scale = scale.to(tl.int32)
            scale = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)
        elif scale_ptr.dtype.element_ty == tl.int8:  # exponent, less 103, and mantissa
            scale = (((scale.to(tl.int32) & 255) << 20) + (103 << 23)).to(tl.float32, bitcast=True)
        scale = scale.to(tl.float32)
        added = scale * -HALF
        if OFFSET == "minimum":
            added = tl.load(offset_ptr + at, mask=held, other=0).to(tl.float32)
        elif OFFSET == "zero":
            added = -tl.load(offset_ptr + at, mask=held, other=0).to(tl.float32) * scale
        return scale, added


@triton.jit
def _add(total, even, odd, sums, code_ptr, at, held, affine, CODES: tl.constexpr,
         OFFSET: tl.constexpr, PAIRED: tl.constexpr):  # fmt: skip
    """Add the products of one group of columns to *total*."""
    code = tl.load(code_ptr + at, mask=held, other=0)
    if OFFSET == "raw":
        total = tl.dot(even, tl.trans(code.to(even.dtype)), total, input_precision="ieee")
    else:
        low = code & 15 if PAIRED else code
        part = tl.dot(even, tl.trans(_decode(low, CODES, even.dtype)), input_precision="ieee")
        if PAIRED:
            high = tl.trans(_decode(code >> 4, CODES, even.dtype))
            part = tl.dot(odd, high, part, input_precision="ieee")
        total += part * affine[0][None, :]
        if OFFSET != "none":
            total += sums[:, None] * affine[1][None, :]
    return total


@triton.jit(do_not_specialize=["pairs"])  # prompts of any length are one variant
def _project(
    x_ptr, slot_ptr, tile_ptr, code_ptr, scale_ptr, offset_ptr, bias_ptr, out_ptr, pairs, choices,
    outputs, columns, row_stride, column_stride, code_stride, scale_stride, TYPE: tl.constexpr,
    CODES: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr, GROUPS_PER_SCALE: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, PAIRS: tl.constexpr, OUTPUTS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Multiply up to 16 pairs of one slot with `OUTPUTS` rows; see `KernelExperts._launch`."""
    tile = tl.program_id(0)
    place = tl.arange(0, _ROWS)
    if PAIRS:
        # The program of each sixteenth pair of a slot computes it and the 15 that follow.
        others = tl.arange(0, PAIRS)
        slot = tl.load(slot_ptr + tile)
        same = tl.load(slot_ptr + others, mask=others < pairs, other=-1) == slot
        rank = tl.cumsum(same.to(tl.int32), axis=0) - 1
        first_rank = tl.sum(tl.where(others == tile, rank, 0), axis=0)
        if first_rank % _ROWS != 0:
            return
        mine = same[None, :] & (rank[None, :] == (first_rank + place)[:, None])
        pair = tl.sum(tl.where(mine, others[None, :], 0), axis=1)
        valid = tl.sum(mine.to(tl.int32), axis=1) > 0
    else:
        slot = tl.load(tile_ptr + 3 * tile)
        begin = tl.load(tile_ptr + 3 * tile + 1)
        end = tl.load(tile_ptr + 3 * tile + 2)
        if begin >= end:
            return
        valid = begin + place < end
        pair = tl.load(slot_ptr + begin + place, mask=valid, other=0)
    slot = slot.to(tl.int64)
    row = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = row < outputs
    code_ptr += slot * code_stride
    scale_ptr += slot * scale_stride
    offset_ptr += slot * scale_stride
    x_at = x_ptr + (pair // choices).to(tl.int64)[:, None] * columns
    row_at = row.to(tl.int64)[:, None] * row_stride
    upper_at = outputs.to(tl.int64) * row_stride
    PAIRED: tl.constexpr = CODES == "uint4" or CODES == "e2m1" or CODES == "levels"
    BYTES: tl.constexpr = GROUP // 2 if PAIRED else GROUP
    SPAN: tl.constexpr = 2 * WIDTH if PAIRED else WIDTH
    HALF: tl.constexpr = 8.0 if PAIRED else 128.0
    k, byte = tl.arange(0, SPAN), tl.arange(0, WIDTH)
    groups = tl.cdiv(columns, GROUP)
    across = tl.cdiv(groups, GROUPS_PER_SCALE)
    scale_at = (row // ROWS_PER_SCALE) * across
    upper_scale_at = ((row + outputs) // ROWS_PER_SCALE) * across
    total = tl.zeros((_ROWS, OUTPUTS), dtype=tl.float32)
    upper = tl.zeros((_ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, groups, UNROLL):
        # All scales first: none of the products has to wait for its own.
        affine, upper_affine = (), ()
        for turn in tl.static_range(UNROLL):
            # Behind the last group inputs are zero, whatever scale they meet.
            shared = tl.minimum(start + turn, groups - 1) // GROUPS_PER_SCALE
            at = scale_at + shared
            one = _load_affine(scale_ptr, offset_ptr, at, inside, OFFSET, HALF)
            affine += (one,)  # type: ignore[assignment]
            if ACTIVATION != "none":
                at = upper_scale_at + shared
                one = _load_affine(scale_ptr, offset_ptr, at, inside, OFFSET, HALF)
                upper_affine += (one,)  # type: ignore[assignment]
        for turn in tl.static_range(UNROLL):
            number = start + turn
            left = tl.minimum(columns - number * GROUP, GROUP)
            held = valid[:, None] & (k < left)[None, :]
            x = tl.load(x_at + (number * GROUP + k)[None, :], mask=held, other=0).to(TYPE)
            sums = tl.sum(x.to(tl.float32), axis=1)
            even, odd = x, x
            if PAIRED:
                even, odd = tl.split(tl.reshape(x, (_ROWS, WIDTH, 2)))
                left = left // 2
            code_at = row_at + ((number * BYTES + byte) * column_stride)[None, :]
            held = inside[:, None] & (byte < left)[None, :]
            total = _add(
                total, even, odd, sums, code_ptr, code_at, held, affine[turn], CODES, OFFSET, PAIRED
            )
            if ACTIVATION != "none":
                upper = _add(
                    upper, even, odd, sums, code_ptr, code_at + upper_at, held, upper_affine[turn],
                    CODES, OFFSET, PAIRED,
                )  # fmt: skip
    if BIAS:
        bias_ptr += slot * outputs * (1 if ACTIVATION == "none" else 2)
        total += tl.load(bias_ptr + row, mask=inside, other=0).to(tl.float32)[None, :]
        if ACTIVATION != "none":
            bias = tl.load(bias_ptr + outputs + row, mask=inside, other=0)
            upper += bias.to(tl.float32)[None, :]
    if ACTIVATION == "silu":
        total = total / (1.0 + tl.exp(-total)) * upper
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476)) * upper
    elif ACTIVATION == "gelu_tanh":
        inner = 1.5957691216057308 * (total + 0.044715 * total * total * total)
        total = total / (1.0 + tl.exp(-inner)) * upper
    out_at = out_ptr + pair.to(tl.int64)[:, None] * outputs + row[None, :]
    value = _narrow(total, out_ptr.dtype.element_ty)
    tl.store(out_at, value, mask=valid[:, None] & inside[None, :])


@triton.jit
def _combine(pair_ptr, weight_ptr, out_ptr, choices, hidden, BLOCK: tl.constexpr):
    """Weight the outputs of a token's pairs and add them up, choice after choice."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(0, choices):
        pair = token * choices + choice
        output = tl.load(pair_ptr + pair * hidden + column, mask=inside, other=0).to(tl.float32)
        total += output * tl.load(weight_ptr + pair).to(tl.float32)
    value = _narrow(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + column, value, mask=inside)


class KernelExperts:
    """An experts function over slots of any format; a CUDA graph can hold it."""

    def __init__(self, layer: ExpertsLayer) -> None:
        self._format = layer.format
        self._parts = {part.name: part for part in layer.tensors}
        module: Any = layer.module
        self._dtype, self._pair_dtype = self._parts["down_proj"].dtype, layer.pair_dtype
        self._gated = bool(getattr(module, "has_gate", True))
        plain = getattr(module._apply_gate, "__func__", None) is _default_apply_gate
        self._activation = "none"
        if self._gated and plain:
            self._activation = _ACTIVATIONS.get(type(module.act_fn).__name__, "none")

    def __call__(
        self, module: Any, hidden_states: Tensor, slot_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Compute all pairs of a request: ``(tokens, hidden)``; every index is a slot."""
        top_k = slot_index.shape[1]
        slots = slot_index.reshape(-1).contiguous()
        few = slots.numel() <= FEW_PAIRS
        where = (slots, slots) if few else tiles(slots, module.num_experts)
        x = hidden_states.to(self._dtype).contiguous()
        if self._activation != "none":
            inner = self._launch(module, "gate_up_proj", x, top_k, where, self._activation)
        elif self._gated:
            inner = module._apply_gate(self._launch(module, "gate_up_proj", x, top_k, where))
        else:
            inner = module.act_fn(self._launch(module, "up_proj", x, top_k, where))
        inner = inner.to(self._dtype).contiguous()
        outputs = self._launch(module, "down_proj", inner, 1, where)
        if module.has_post_expert_norm:
            outputs = module.post_expert_norm(outputs)
        return self.combine(outputs, top_k_weights, hidden_states.dtype)

    def combine(self, outputs: Tensor, top_k_weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight all pairs ``(tokens * top_k, hidden)`` and sum: ``(tokens, hidden)``."""
        tokens, top_k = top_k_weights.shape
        hidden = outputs.shape[1]
        total = torch.empty((tokens, hidden), dtype=dtype, device=outputs.device)
        _combine[(tokens, triton.cdiv(hidden, _BLOCK))](
            outputs.contiguous(), top_k_weights.contiguous(), total, top_k, hidden, BLOCK=_BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return total

    def _launch(
        self, module: Any, name: str, x: Tensor, choices: int, where: Sequence[Tensor],
        activation: str = "none",
    ) -> Tensor:  # fmt: skip
        """
        Multiply pairs with the projection *name* of their slots: ``(pairs, outputs)``.

        Pair *p* takes row ``p // choices`` of *x*; *where* has the slots of the pairs, twice, or
        what `tiles` gives. An *activation* is applied to the first half of the outputs, which is
        then multiplied with the second.
        """
        order, table = where
        pairs, few = order.numel(), order is table
        outputs, columns = self._parts[name].rows_columns
        fused = activation != "none"
        outputs //= 2 if fused else 1
        how = arithmetic(self._format, columns)
        if isinstance(self._format, PackedFormat):
            codes, scales = (getattr(module, f"{name}.{kind}") for kind in ("codes", "scales"))
            strides, offsets = (codes.stride(1), 1), scales
            for kind in ("minimums", "zeros"):
                offsets = getattr(module, f"{name}.{kind}", offsets)
        else:
            codes = scales = offsets = getattr(module, name)
            strides = (codes.stride(1), codes.stride(2))
            strides = strides[::-1] if self._parts[name].transposed else strides
        bias = getattr(module, f"{name}_bias") if module.has_bias else codes
        if codes.dtype == torch.float8_e4m3fn:
            codes = codes.view(torch.uint8)
        out = torch.empty(
            (pairs, outputs), dtype=self._dtype if fused else self._pair_dtype, device=x.device
        )
        # The interpreter multiplies no bfloat16; in float32 the products are the same.
        compute = torch.float32 if x.device.type == "cpu" else self._dtype
        rows = (_ROWS.value if pairs <= _ROWS.value else FEW_PAIRS) if few else 0
        programs = pairs if few else table.shape[0]
        _project[(programs, triton.cdiv(outputs, OUTPUTS))](
            x, order, table, codes, scales, offsets, bias, out,
            pairs, choices, outputs, columns, *strides, codes.stride(0), scales.stride(0),
            **constants(how, compute, activation, bool(module.has_bias), rows),
            num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=False,
        )  # fmt: skip
        return out


def arithmetic(stored: ExpertFormat, columns: int) -> Arithmetic:
    """How rows with so many *columns* are read."""
    if isinstance(stored, PackedFormat):
        return stored.arithmetic(columns)
    return Arithmetic("raw", _COLUMNS, "raw")


def constants(
    how: Arithmetic, dtype: torch.dtype, activation: str, bias: bool, pairs: int
) -> dict[str, Any]:
    """Choose the compiled variant of `_project`; with *pairs* 0 the one that takes a table."""
    paired = how.codes in ("uint4", "e2m1", "levels")
    return {
        "TYPE": _TYPES[dtype], "CODES": how.codes, "OFFSET": how.offset, "GROUP": how.group,
        "WIDTH": max(16, how.group // 2 if paired else how.group),
        "ROWS_PER_SCALE": how.rows_per_scale, "GROUPS_PER_SCALE": how.groups_per_scale,
        "ACTIVATION": activation, "BIAS": bias, "PAIRS": pairs, "OUTPUTS": OUTPUTS,
        "UNROLL": max(1, 128 // how.group),
    }  # fmt: skip


def tiles(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """
    Sort pairs by slot and cut them into tiles of 16, without asking what they are: the pairs by
    slot, and int64 ``(tiles, 3)``: slot, first and end of each. The last may be empty.
    """
    rows = _ROWS.value
    ordered, order = torch.sort(slots, stable=True)
    each = torch.arange(num_slots, device=slots.device)
    begins = torch.searchsorted(ordered, each)
    ends = torch.searchsorted(ordered, each, right=True)
    until = torch.cumsum((ends - begins + rows - 1) // rows, dim=0)
    most = slots.numel() // rows + min(num_slots, slots.numel())
    number = torch.arange(most, device=slots.device)
    slot = torch.searchsorted(until, number, right=True).clamp_(max=num_slots - 1)
    # Counted back from the slot's end: its last tile ends where the slot's pairs do.
    left = until[slot] - number
    size = ends[slot] - begins[slot]
    begin = begins[slot] + ((size + rows - 1) // rows - left) * rows
    end = torch.minimum(begin + rows, ends[slot])
    return order, torch.stack([slot, begin, end], dim=1)
