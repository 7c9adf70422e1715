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


@contextmanager
def on_the_host():
    """In the body, launches of the kernels known here are computed by numpy."""
    interpret = interpreter.GridExecutor.__call__

    def launch(grid, *args, **kwargs):
        stand_in = KERNELS.get(grid.fn.__name__)
        if stand_in is None:
            return interpret(grid, *args, **kwargs)
        with torch._C._DisableTorchDispatch():
            arrays = [_array(one) if isinstance(one, torch.Tensor) else one for one in args]
            stand_in(*arrays, **kwargs)

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
    counters[layer] += (
        known.sum(), hits, len(decision.loads), len(distinct) > 0, decision.first_uses
    )  # fmt: skip
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


def expand(
    addresses, chunks, experts, slots, num_loads, num_chunks, *, TYPE, BF16, BITS, GROUP, **_
):
    """Codes with a float16 scale and minimum for each group; biases as they are."""
    size = TYPE.primitive_bitwidth // 8
    for number in range(num_loads.reshape(-1)[0]):
        block, slot = int(addresses[experts[number]]), int(slots[number])
        for shared, offset, scales, minimums, target, stride, count, first in chunks[
            :num_chunks
        ].tolist():
            into = target + slot * stride
            if not shared:
                ctypes.memmove(into, block + offset, count * size)
                continue
            codes = _memory(block + offset, np.uint8, count, GROUP * BITS // 8)
            if BITS == 4:
                codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(count, GROUP)
            at = (first + np.arange(count)) // shared
            scale, least = (
                _memory(block + part, np.float16, at[-1] + 1, 1)[at].astype(np.float32)
                for part in (scales, minimums)
            )
            weights = codes.astype(np.float32) * scale + least
            if BF16:  # to the nearest, ties to even
                bits = weights.view(np.uint32)
                weights = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            elif size == 2:
                weights = weights.astype(np.float16)
            _memory(into, weights.dtype, count, GROUP)[:] = weights


def _memory(address, dtype, rows, columns):
    nbytes = rows * columns * np.dtype(dtype).itemsize
    raw = (ctypes.c_uint8 * nbytes).from_address(address)
    return np.frombuffer(raw, dtype).reshape(rows, columns)


KERNELS = {"_decide": decide, "_close_step": close_step, "_copy": copy, "_expand": expand}
