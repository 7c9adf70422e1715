"""
Decide on the device which chosen experts are resident, which are loaded, and which leave for them.

One Triton program decides one layer's request, exactly as `cache.residency.Residency.request`, from
what the router chose; it can be captured in a CUDA graph. The state of a layer is a row of int64,
as `cache.packing` has it; LFU's doubles are seen as int64, which order alike since none is
negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from melinoe.cache.counters import COMPLETION, Counters
from melinoe.cache.packing import pack, packed_length, unpack
from melinoe.cache.policy import DecayedLFU, Policy
from melinoe.cache.residency import Residency
from melinoe.errors import AttachError

# Exponent fields of doubles: 2**0, 2**512, and what a field and the power it scales by add up to.
_ONE = tl.constexpr(1023 << 52)
_LIMIT = tl.constexpr((1023 + 512) << 52)
_TWICE = tl.constexpr(2045)
_NEVER = tl.constexpr((1 << 63) - 1)

# Fields of a row of the counters.
COUNTERS = ("uses", "hits", "loads", "requests")
_FIELDS = tl.constexpr(len(COUNTERS))

# (token, choice) pairs of one request: 16 bits count them.
MOST_PAIRS = 65535
MOST_EXPERTS = 512
# From so many on (a prompt's batch, not a decode step), more warps take more pairs at a time.
_MANY_PAIRS = 256


@triton.jit(do_not_specialize=["layer", "num_pairs"])
def _decide(
    index_ptr, weight_ptr, slot_index_ptr, weight_out_ptr, state_ptr, gamma_ptr, load_expert_ptr,
    load_slot_ptr, num_loads_ptr, counters_ptr, layer, num_pairs, num_experts, capacity,
    state_stride, list_stride, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, LFU: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    # A lane is one layer with its own request; tests decide many at a time, the engine one.
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    row = lane + layer
    experts = tl.arange(0, BLOCK_E)[None, :]
    exists = (experts < num_experts) & (lane[:, None] >= 0)
    clock_ptr = state_ptr + row.to(tl.int64) * state_stride
    key_at = clock_ptr[:, None] + 1 + experts
    slot_at = key_at + num_experts
    expert_of_at = clock_ptr + 1 + 2 * num_experts
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
    tl.store(num_loads_ptr + row, num_missing)

    counted = counters_ptr + row * _FIELDS
    tl.store(counted, tl.load(counted) + num_uses)
    tl.store(counted + 1, tl.load(counted + 1) + hit_uses)
    tl.store(counted + 2, tl.load(counted + 2) + num_missing)
    tl.store(counted + 3, tl.load(counted + 3) + (num_needed > 0).to(tl.int64))

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


class DeviceResidency:
    """
    Which experts of all layers are resident, as tensors on the device.

    *state*: int64, a row by layer, as the module's docstring has it. *load_expert*, *load_slot*,
    *num_loads*: int32, by layer: what to load, the slots, how many hold. *counts*: int64 ``(layers
    + 1, 4)``: `COUNTERS` by layer; in the last row tokens, passes, passes without a load, and their
    tokens. For a prompt, a layer is taken to the host as a `Residency` (`pull`) and brought back
    (`push`). MelinoeError, AttachError: another policy; too many experts; policies that differ.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        capacity: Sequence[int],
        policy: Sequence[Callable[[], Policy]],
        device: torch.device,
    ) -> None:
        if max(num_experts) > MOST_EXPERTS:
            raise AttachError(
                f"the device engine takes at most {MOST_EXPERTS} experts a layer and this model "
                f'has {max(num_experts)}; use engine="reference"'
            )
        self.num_experts, self.capacity = tuple(num_experts), tuple(capacity)
        self.on_host = [
            Residency(experts, slots, make())
            for experts, slots, make in zip(num_experts, capacity, policy, strict=True)
        ]
        kinds = {(one.policy.name, getattr(one.policy, "gamma", None)) for one in self.on_host}
        if len(kinds) > 1:
            raise AttachError(
                "the device engine decides all layers by one rule and the policies given differ; "
                'use engine="reference"'
            )
        layers, most = len(self.capacity), max(self.capacity)
        widest = max(map(packed_length, self.num_experts, self.capacity))
        first = self.on_host[0].policy
        with torch.inference_mode(False):
            self.state = torch.zeros(layers, widest, dtype=torch.int64, device=device)
            self.load_expert = torch.zeros(layers, most, dtype=torch.int32, device=device)
            self.load_slot = torch.zeros_like(self.load_expert)
            self.num_loads = torch.zeros(layers, dtype=torch.int32, device=device)
            self.counts = torch.zeros(layers + 1, len(COUNTERS), dtype=torch.int64, device=device)
            self.gamma = None
            if isinstance(first, DecayedLFU):
                self.gamma = torch.tensor([first.gamma], dtype=torch.float64, device=device)
        for layer in range(layers):
            self.push(layer)

    def decide(
        self, layer: int, top_k_index: Tensor, top_k_weights: Tensor, lanes: int = 1
    ) -> tuple[Tensor, Tensor]:
        """
        Decide one request of *layer* on the device; the host neither waits nor learns of it.

        At most `MOST_PAIRS` pairs ``(tokens, top_k)``, of no more experts than slots; with *lanes*
        so many layers at once. Returns slots, int64, and weights; a choice of no expert has weight
        zero and some slot.
        """
        index, weights = top_k_index.contiguous(), top_k_weights.contiguous()
        slots = torch.empty_like(index, dtype=torch.int64)
        kept = torch.empty_like(weights)
        pairs, experts = index.numel() // lanes, self.num_experts[layer]
        assert pairs <= MOST_PAIRS, "the host decides such a pass"
        block = triton.next_power_of_2(experts)
        warps, most = (1 if block <= 128 else block // 128), 2048
        if pairs > _MANY_PAIRS:
            warps, most = max(4, warps), 8192
        _decide[(1,)](
            index, weights, slots, kept, self.state,
            self.state if self.gamma is None else self.gamma, self.load_expert, self.load_slot,
            self.num_loads, self.counts, layer, pairs, experts, self.capacity[layer],
            self.state.stride(0), self.load_expert.stride(0),
            BLOCK_E=block,
            BLOCK_P=max(2, min(most // 128, triton.next_power_of_2(pairs), most // block)),
            LFU=self.gamma is not None, LANES=lanes, num_warps=warps,
        )  # fmt: skip
        return slots, kept

    def close_step(self, tokens: int) -> None:
        """Count a pass of *tokens* tokens whose layers have all decided."""
        layers = len(self.num_loads)
        _close_step[(1,)](
            self.num_loads, self.counts[-1], layers, tokens,
            BLOCK=triton.next_power_of_2(layers), num_warps=1,
        )  # fmt: skip

    def counters(self) -> Counters:
        """Read the counts, which are all of the completion's phase; waits for the device."""
        counts = self.counts.cpu().numpy()
        values = Counters(len(counts) - 1).to_dict()
        for field, name in enumerate(COUNTERS):
            values[name][COMPLETION] = counts[:-1, field].tolist()
        names = ("tokens", "forwards", "zero_miss_forwards", "zero_miss_tokens")
        for field, name in enumerate(names):
            values[name][COMPLETION] = int(counts[-1, field])
        return Counters.from_dict(values)

    def pull(self, layer: int) -> Residency:
        """Copy the layer's state to the host; waits for the device."""
        residency = self.on_host[layer]
        length = packed_length(residency.num_experts, residency.capacity)
        unpack(self.state[layer, :length].cpu().numpy(), residency)
        return residency

    def push(self, layer: int) -> None:
        """Copy the host's `Residency` of *layer* to the device."""
        row = to_device(pack(self.on_host[layer]), self.state.device)
        self.state[layer, : row.shape[0]].copy_(row)

    def resident(self, layer: int) -> list[int]:
        """Ids of the layer's resident experts, ascending; any thread may ask. Waits."""
        # From the device alone: `on_host` belongs to whoever is between `pull` and `push`.
        first = 1 + self.num_experts[layer]
        slot_of = self.state[layer, first : first + self.num_experts[layer]].cpu().numpy()
        return np.flatnonzero(slot_of >= 0).tolist()

    def reset(self) -> None:
        """Empty all slots, and let the policies forget; the counters stay."""
        for layer, residency in enumerate(self.on_host):
            residency.reset()
            self.push(layer)

    def fits(self, tokens: int, top_k: int) -> bool:
        """Tell whether *tokens* tokens can never need more experts of a layer than it has slots."""
        return tokens * top_k <= MOST_PAIRS and all(
            min(tokens * top_k, experts) <= slots
            for experts, slots in zip(self.num_experts, self.capacity, strict=True)
        )


def to_device(table: np.ndarray, device: torch.device) -> Tensor:
    """Copy a small table to *device*, in the order of its stream, without waiting."""
    found = torch.from_numpy(table)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
