"""
The device engine's kernels computed by numpy instead of Triton's interpreter, which takes 20 times
as long. Tests of the kernels themselves run them interpreted; `test_kernels_on_the_host.py` holds
that both do the same.
"""

import ctypes
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from triton.runtime import interpreter

from melinoe.cache.packing import pack, packed_length, unpack
from melinoe.cache.policy import policy as make_policy
from melinoe.cache.residency import Residency
from melinoe.experts.packed_dot import E2M1, LEVELS


@contextmanager
def on_the_host():
    """In the body, launches of the kernels known here are computed by numpy."""
    interpret = interpreter.GridExecutor.__call__

    def launch(grid, *args, **kwargs):
        stand_in = KERNELS.get(grid.fn.__name__)
        if stand_in is None:
            return interpret(grid, *args, **kwargs)
        with torch._C._DisableTorchDispatch():
            if stand_in not in (project, combine):
                args = [_array(one) if isinstance(one, torch.Tensor) else one for one in args]
            stand_in(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = interpret


def _array(tensor):
    """The same memory; of types that numpy does not know, the bytes."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint8) if tensor.is_floating_point() else tensor).numpy()


@cache
def _residency(num_experts, capacity, gamma):
    policy = make_policy("lru") if gamma is None else make_policy("lfu", gamma=gamma)
    return Residency(num_experts, capacity, policy)


def decide(
    index, weights, slots, kept, state, gamma, load_expert, load_slot, num_loads, counters,
    layer, pairs, num_experts, capacity, *_, LFU, LANES, **__,
):  # fmt: skip
    """By `cache.Residency`, taken from the row and put back."""
    assert LANES == 1
    residency = _residency(num_experts, capacity, float(gamma.view(np.float64)[0]) if LFU else None)
    row = state[layer, : packed_length(num_experts, capacity)]
    unpack(row, residency)
    ids = index.ravel().astype(np.int64)
    known = (ids >= 0) & (ids < num_experts)
    distinct, uses = np.unique(ids[known], return_counts=True)
    hits = uses[residency.slot_of[distinct] >= 0].sum()
    decision = residency.request(distinct.tolist())
    row[:] = pack(residency)
    for place, load in enumerate(decision.loads):
        load_expert[layer, place], load_slot[layer, place] = load.expert, load.slot
    num_loads[layer] = len(decision.loads)
    counters[layer] += known.sum(), hits, len(decision.loads), len(distinct) > 0
    some = residency.slot_of[distinct[0]] if len(distinct) else 0
    slots.reshape(-1)[:] = np.where(known, residency.slot_of[np.where(known, ids, 0)], some)
    kept.reshape(pairs, -1)[:] = weights.reshape(pairs, -1) * known[:, None]


def close_step(num_loads, step, num_layers, tokens, **_):
    free = not num_loads[:num_layers].any()
    step[:4] += (tokens, 1, free, free * tokens)


def copy(addresses, chunks, experts, slots, num_loads, num_chunks, *, VECTOR, BYTES, **_):
    """Byte by byte, between raw addresses."""
    size = BYTES // VECTOR
    for number in range(num_loads.reshape(-1)[0]):
        block, slot = int(addresses[experts[number]]), int(slots[number])
        for offset, target, stride, count in chunks[:num_chunks].tolist():
            ctypes.memmove(target + slot * stride, block + offset, count * size)


def project(
    x, order, table, codes, scales, offsets, bias, out, pairs, choices, outputs, columns,
    row_stride, *_,
    CODES, OFFSET, GROUP, ROWS_PER_SCALE, GROUPS_PER_SCALE, ACTIVATION, BIAS, PAIRS, OUTPUTS, **__,
):  # fmt: skip
    """Group after group, products added up in float64 as by the interpreter of these tests."""
    where = order
    if not PAIRS:  # then they are sorted, and a table has the slot of each tile
        where = torch.empty_like(order)
        where[order] = table[:, 0].repeat_interleave((table[:, 2] - table[:, 1]).clamp(min=0))
    halves = 1 if ACTIVATION == "none" else 2
    for slot in where.unique().tolist():
        pair = (where == slot).nonzero().flatten().tolist()
        rows = x[[p // choices for p in pair]].float().numpy()
        matrix = codes[slot].T if row_stride == 1 else codes[slot]
        found = _products(
            rows, matrix, scales[slot], offsets[slot], CODES, OFFSET, GROUP, ROWS_PER_SCALE,
            GROUPS_PER_SCALE,
        )  # fmt: skip
        if BIAS:
            found = found + bias[slot].float().numpy()
        total, upper = found[:, :outputs], found[:, outputs:]
        if ACTIVATION == "silu":
            total = total / (np.float32(1) + np.exp(-total)) * upper
        assert ACTIVATION in ("none", "silu") and found.shape[1] == halves * outputs
        out[pair] = torch.from_numpy(total).to(out.dtype)


def combine(outputs, weights, out, choices, hidden, **_):
    """Choice after choice, in float32."""
    pairs = outputs.float().numpy().reshape(-1, choices, hidden)
    weights = weights.float().numpy()
    total = np.zeros((len(pairs), hidden), np.float32)
    for choice in range(choices):
        total = total + pairs[:, choice] * weights[:, choice, None]
    out[:] = torch.from_numpy(total).to(out.dtype)


def _products(x, codes, scales, offsets, CODES, OFFSET, GROUP, DOWN, ACROSS):
    """float32 ``(pairs, rows)`` of float32 *x* with one slot's projection."""
    if OFFSET == "raw":
        weights = codes.float().numpy()
        total = np.zeros((len(x), len(weights)), np.float32)
        for at in range(0, x.shape[1], GROUP):
            total = _dot(x[:, at : at + GROUP], weights[:, at : at + GROUP], total)
        return total
    half = {"uint4": 8, "uint8": 128}.get(CODES, 0)
    paired = CODES in ("uint4", "e2m1", "levels")
    if paired:
        pair = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
        levels = {"e2m1": E2M1, "levels": LEVELS}.get(CODES, range(16))
        levels = torch.tensor(levels, dtype=torch.float32)
        numbers = levels[pair.long()].numpy()
    else:
        numbers = (codes.view(torch.float8_e4m3fn) if CODES == "e4m3" else codes).float().numpy()
    scale = scales.float()
    if scales.dtype == torch.uint8:
        scale = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    elif scales.dtype == torch.int8:
        bits = scales.view(torch.uint8).int()
        scale = torch.ldexp(1 + (bits % 8).float() / 8, bits // 8 - 24)
    scale = scale.repeat_interleave(DOWN, 0)[: len(numbers)].numpy()
    added = None
    if OFFSET == "symmetric":
        added = scale * np.float32(-half)
    elif OFFSET != "none":
        added = offsets.float().numpy()
        added = added if OFFSET == "minimum" else -added * scale
    total = np.zeros((len(x), len(numbers)), np.float32)
    for number in range(x.shape[1] // GROUP):
        of = slice(number * GROUP, (number + 1) * GROUP)
        if paired:
            part = _dot(x[:, of][:, ::2], numbers[:, of][:, ::2], np.float32(0))
            part = _dot(x[:, of][:, 1::2], numbers[:, of][:, 1::2], part)
        else:
            part = _dot(x[:, of], numbers[:, of], np.float32(0))
        total = total + part * scale[:, number // ACROSS]
        if added is not None:
            total = total + x[:, of].sum(axis=1)[:, None] * added[:, number // ACROSS]
    return total


def _dot(x, weights, total):
    return (x.astype(np.float64) @ weights.T.astype(np.float64) + total).astype(np.float32)


KERNELS = {
    "_decide": decide, "_close_step": close_step, "_copy": copy, "_project": project,
    "_combine": combine,
}  # fmt: skip
