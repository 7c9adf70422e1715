"""
Decide on the device which chosen experts are resident, which are loaded, and which leave for them.

One Triton program decides one layer's request, exactly as `cache.residency.Residency.request`. It
reads what the router chose, so that the host need not; it is launched once per layer and step and
can be captured in a CUDA graph.

The state of one layer is one row of int64, laid out as

    clock | keys (num_experts,) | slot_of (num_experts,) | expert_of (capacity,)
          | unused (num_experts,)

LRU: *clock* is the next stamp and *keys* are the stamps of last uses. LFU: *clock* is the unit and
*keys* are the scores, both doubles seen as int64; none is negative, so their bits order as they do
and one comparison of integers serves both policies. *unused* is 1 for experts that a prefetch
brought and that no request has asked for since.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Exponent fields of doubles: 2**0, 2**512, and what a field and the power it scales by add up to.
_ONE = tl.constexpr(1023 << 52)
_LIMIT = tl.constexpr((1023 + 512) << 52)
_TWICE = tl.constexpr(2045)
_NEVER = tl.constexpr((1 << 63) - 1)

# Fields of a row of the counters.
USES, HITS, LOADS, REQUESTS, PREFETCH_USED = range(5)
NUM_COUNTERS = 5
_FIELDS = tl.constexpr(NUM_COUNTERS)

# (token, choice) pairs of one request: 16 bits count them.
MOST_PAIRS = 65535
# From so many on (a prompt's batch, not a decode step), more warps take more pairs at a time.
_MANY_PAIRS = 256


@triton.jit(do_not_specialize=["layer", "num_pairs"])
def _decide(
    index_ptr,
    weight_ptr,
    slot_index_ptr,
    weight_out_ptr,
    state_ptr,
    gamma_ptr,
    load_expert_ptr,
    load_slot_ptr,
    num_loads_ptr,
    counters_ptr,
    layer,
    num_pairs,
    num_experts,
    capacity,
    state_stride,
    list_stride,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LFU: tl.constexpr,
    LANES: tl.constexpr,
):
    # A lane is one layer with its own request; tests decide many at a time, the engine one.
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row = lane + layer
    experts = tl.arange(0, BLOCK_E)[None, :]
    exists = (experts < num_experts) & (lane[:, None] >= 0)
    clock_ptr = state_ptr + row.to(tl.int64) * state_stride
    key_at = clock_ptr[:, None] + 1 + experts
    slot_at = key_at + num_experts
    expert_of_at = clock_ptr + 1 + 2 * num_experts
    unused_at = expert_of_at[:, None] + capacity + experts
    pairs = lane[:, None] * num_pairs + tl.arange(0, BLOCK_P)[None, :]

    # Which experts are needed, and by how many (token, choice) pairs.
    uses = tl.zeros((LANES, BLOCK_E), dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK_P):
        inside = (start + tl.arange(0, BLOCK_P))[None, :] < num_pairs
        chosen = tl.load(index_ptr + pairs + start, mask=inside, other=-1).to(tl.int32)
        same = chosen[:, :, None] == experts[:, None, :]
        uses += tl.sum(same.to(tl.int32), axis=1)
    uses = tl.where(exists, uses, 0)
    needed = uses > 0
    slot = tl.load(slot_at, mask=exists, other=-1)
    resident = slot >= 0
    missing = needed & (slot < 0)
    # Five sums in one: 10 bits for each count of experts, 16 for each of pairs.
    packed = needed.to(tl.int64) | missing.to(tl.int64) << 10 | resident.to(tl.int64) << 20
    packed |= tl.where(resident, uses, 0).to(tl.int64) << 30 | uses.to(tl.int64) << 46
    sums = tl.sum(packed, axis=1)
    num_needed = (sums & 1023).to(tl.int32)
    num_missing = (sums >> 10 & 1023).to(tl.int32)
    filled = (sums >> 20 & 1023).to(tl.int32)
    hit_uses, num_uses = sums >> 30 & 65535, sums >> 46

    # Experts that a prefetch brought and that this request is the first to ask for.
    unused = tl.load(unused_at, mask=exists, other=0)
    first_uses = tl.sum(tl.where(needed, unused, 0), axis=1)

    # Tell the policy; without a needed expert there is no request and nothing changes.
    key = tl.load(key_at, mask=exists, other=0)
    clock = tl.load(clock_ptr)
    if LFU:
        gamma = tl.load(gamma_ptr)
        grown = (clock.to(tl.float64, bitcast=True) / gamma).to(tl.int64, bitcast=True)
        # Past 2**512 the unit and all scores are divided by the power of two in the unit.
        over = grown > _LIMIT
        factor_bits = tl.where(over, (_TWICE - (grown >> 52)) << 52, _ONE)
        factor = factor_bits.to(tl.float64, bitcast=True)
        unit = grown.to(tl.float64, bitcast=True) * factor
        score = key.to(tl.float64, bitcast=True) * factor[:, None]
        score = tl.where(needed, score + unit[:, None], score)
        heard = num_needed > 0
        key = tl.where(heard[:, None], score.to(tl.int64, bitcast=True), key)
        clock = tl.where(heard, unit.to(tl.int64, bitcast=True), clock)
    else:
        order = tl.cumsum(needed.to(tl.int64), axis=1) - 1
        key = tl.where(needed, clock[:, None] + order, key)
        clock += num_needed
    tl.debug_barrier()  # every warp has read the state before any of it is overwritten
    tl.store(key_at, key, mask=exists)
    tl.store(clock_ptr, clock)

    # Loads in ascending order of experts: free slots first, lowest first, then the victims'.
    leaves = tl.where(resident & (uses == 0), key, _NEVER)
    for number in range(0, tl.max(num_missing, axis=0)):
        active = number < num_missing
        expert = tl.min(tl.where(missing, experts, BLOCK_E), axis=1)
        free = filled + number < capacity
        _, victim = tl.min(leaves, axis=1, return_indices=True)  # of equal keys the lowest id
        of_victim = experts == victim[:, None]
        taken = tl.sum(tl.where(of_victim, slot, 0), axis=1)
        place = tl.where(free, (filled + number).to(tl.int64), taken)
        evicted = of_victim & (active & (free == 0))[:, None]
        loaded = (experts == expert[:, None]) & active[:, None]
        slot = tl.where(loaded, place[:, None], tl.where(evicted, -1, slot))
        leaves = tl.where(evicted, _NEVER, leaves)
        missing = missing & (loaded == 0)
        entry = row * list_stride + number
        tl.store(load_expert_ptr + entry, expert, mask=active)
        tl.store(load_slot_ptr + entry, place.to(tl.int32), mask=active)
        tl.store(expert_of_at + place, expert.to(tl.int64), mask=active)
    tl.store(slot_at, slot, mask=exists)
    tl.store(unused_at, tl.where(needed | (slot < 0), 0, unused), mask=exists)
    tl.store(num_loads_ptr + row, num_missing)

    counted = counters_ptr + row * _FIELDS
    tl.store(counted, tl.load(counted) + num_uses)
    tl.store(counted + 1, tl.load(counted + 1) + hit_uses)
    tl.store(counted + 2, tl.load(counted + 2) + num_missing)
    tl.store(counted + 3, tl.load(counted + 3) + (num_needed > 0).to(tl.int64))
    tl.store(counted + 4, tl.load(counted + 4) + first_uses)

    # Renumber the pairs. "No expert" computes some loaded slot with weight zero.
    first = tl.min(tl.where(needed, experts, BLOCK_E), axis=1)
    some = tl.sum(tl.where(experts == first[:, None], slot, 0), axis=1)
    tl.debug_barrier()  # slot_of was stored by other threads than those that read it here
    for start in range(0, num_pairs, BLOCK_P):
        inside = (start + tl.arange(0, BLOCK_P))[None, :] < num_pairs
        chosen = tl.load(index_ptr + pairs + start, mask=inside, other=-1).to(tl.int32)
        known = inside & (chosen >= 0) & (chosen < num_experts)
        at = clock_ptr[:, None] + 1 + num_experts + chosen
        mapped = tl.where(known, tl.load(at, mask=known, other=0), some[:, None])
        tl.store(slot_index_ptr + pairs + start, mapped, mask=inside)
        weight = tl.load(weight_ptr + pairs + start, mask=known, other=0.0)
        tl.store(weight_out_ptr + pairs + start, weight, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _close_step(num_loads_ptr, step_ptr, num_layers, tokens, BLOCK: tl.constexpr):
    layers = tl.arange(0, BLOCK)
    loads = tl.sum(tl.load(num_loads_ptr + layers, mask=layers < num_layers, other=0), axis=0)
    free = (loads == 0).to(tl.int64)
    tl.store(step_ptr, tl.load(step_ptr) + tokens)
    tl.store(step_ptr + 1, tl.load(step_ptr + 1) + 1)
    tl.store(step_ptr + 2, tl.load(step_ptr + 2) + free)
    tl.store(step_ptr + 3, tl.load(step_ptr + 3) + free * tokens)


def decide(
    state: Tensor,
    gamma: Tensor | None,
    load_expert: Tensor,
    load_slot: Tensor,
    num_loads: Tensor,
    counters: Tensor,
    layer: int,
    num_experts: int,
    capacity: int,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lanes: int = 1,
) -> tuple[Tensor, Tensor]:
    """
    Decide one request on the device; the host neither waits nor learns of it.

    No more than *capacity* distinct experts may be chosen, which the caller guarantees.

    Args:
        state: int64 ``(layers, 1 + 3 * num_experts + capacity)`` or wider; changed in place.
        gamma: float64 ``(1,)``, the decay of LFU; None for LRU.
        load_expert: int32 ``(layers, capacity)`` or wider; the experts to load, ascending.
        load_slot: int32, as *load_expert*; the slots they go to.
        num_loads: int32 ``(layers,)``; how many entries of the two lists hold.
        counters: int64 ``(layers, 5)``: uses, hits, loads, requests, first uses of what was
            prefetched; added to.
        layer: row of all those.
        num_experts: of this layer, at most 512.
        capacity: slots of this layer.
        top_k_index: ``(tokens, top_k)``, any integer type, at most `MOST_PAIRS` entries; ids
            outside ``[0, num_experts)`` are choices of no expert.
        top_k_weights: ``(tokens, top_k)``.
        lanes: decide so many layers at once, from *layer* on; the two arguments above then have a
            leading dimension of it.

    Returns:
        Slots, int64, and weights, both shaped as *top_k_index*; a choice of no expert has weight
        zero and a slot that holds some expert.
    """
    index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
    slots = torch.empty_like(index, dtype=torch.int64)
    kept = torch.empty_like(weights)
    pairs = index.numel() // lanes
    assert pairs <= MOST_PAIRS, "the host decides such a pass"
    block = triton.next_power_of_2(num_experts)
    warps, most = (1 if block <= 128 else block // 128), 2048
    if pairs > _MANY_PAIRS:
        warps, most = max(4, warps), 8192
    _decide[(1,)](
        index, weights, slots, kept, state, state if gamma is None else gamma,
        load_expert, load_slot, num_loads, counters, layer, pairs, num_experts, capacity,
        state.stride(0), load_expert.stride(0),
        BLOCK_E=block,
        BLOCK_P=max(2, min(most // 128, triton.next_power_of_2(pairs), most // block)),
        LFU=gamma is not None, LANES=lanes, num_warps=warps,
    )  # fmt: skip
    return slots, kept


def close_step(num_loads: Tensor, step: Tensor, tokens: int) -> None:
    """
    Count a forward pass whose layers have all decided.

    Args:
        num_loads: int32 ``(layers,)``, as the layers left it.
        step: int64 ``(4,)`` or longer: tokens, passes, passes without a load, tokens of those;
            added to.
        tokens: rows of the pass.
    """
    layers = num_loads.shape[0]
    _close_step[(1,)](
        num_loads, step, layers, tokens, BLOCK=triton.next_power_of_2(layers), num_warps=1
    )
