"""Which experts are resident, kept on the device as the tensors that the decide kernel works on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.counters import COMPLETION, Counters
from melinoe.cache.packing import pack, packed_length, unpack
from melinoe.cache.policy import DecayedLFU, Policy
from melinoe.cache.residency import Residency
from melinoe.engine.device.decide import (
    HITS,
    LOADS,
    MOST_PAIRS,
    NUM_COUNTERS,
    PREFETCH_USED,
    REQUESTS,
    USES,
    close_step,
    decide,
)
from melinoe.errors import AttachError

MOST_EXPERTS = 512
# Counters by layer, and their columns.
_FIELDS = {
    "uses": USES, "hits": HITS, "loads": LOADS, "requests": REQUESTS,
    "prefetch_used": PREFETCH_USED,
}  # fmt: skip


class DeviceResidency:
    """
    The slots of all layers of a model, as tensors on its device.

    `decide` serves a decode step without the host. For a prompt, a layer is taken to the host as a
    `Residency` (`pull`) and brought back (`push`).

    Args:
        num_experts: per layer, at most 512.
        capacity: slots per layer.
        policy: per layer, makes its policy: LRU in all, or decayed LFU with one gamma in all.
        device: where the tensors are.

    Raises:
        MelinoeError: another policy.
        AttachError: too many experts; policies that differ.
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
                f"the fast engine takes at most {MOST_EXPERTS} experts a layer and this model "
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
                "the fast engine decides all layers by one rule and the policies given differ; "
                'use engine="reference"'
            )
        layers, most = len(self.capacity), max(self.capacity)
        lengths = map(packed_length, self.num_experts, self.capacity)
        with torch.inference_mode(False):

            def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
                return torch.zeros(shape, dtype=dtype, device=device)

            self.state = zeros(layers, max(lengths), dtype=torch.int64)
            self.load_expert = zeros(layers, most, dtype=torch.int32)
            self.load_slot = zeros(layers, most, dtype=torch.int32)
            self.num_loads = zeros(layers, dtype=torch.int32)
            # By layer, and in the last row by pass: one tensor, so that one copy reads it.
            self.counts = zeros(layers + 1, NUM_COUNTERS, dtype=torch.int64)
            first = self.on_host[0].policy
            self.gamma = (
                torch.tensor([first.gamma], dtype=torch.float64, device=device)
                if isinstance(first, DecayedLFU)
                else None
            )
        for layer in range(layers):
            self.push(layer)

    def decide(
        self, layer: int, top_k_index: Tensor, top_k_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decide one request of *layer* on the device (see `decide`)."""
        return decide(
            self.state, self.gamma, self.load_expert, self.load_slot, self.num_loads, self.counts,
            layer, self.num_experts[layer], self.capacity[layer], top_k_index, top_k_weights,
        )  # fmt: skip

    def close_step(self, tokens: int) -> None:
        """Count a pass of *tokens* tokens whose layers have all decided."""
        close_step(self.num_loads, self.counts[-1], tokens)

    def pull(self, layer: int) -> Residency:
        """Copy the layer's state to the host; waits for the device."""
        residency = self.on_host[layer]
        length = packed_length(residency.num_experts, residency.capacity)
        unpack(self.state[layer, :length].cpu().numpy(), residency)
        return residency

    def resident(self, layer: int) -> list[int]:
        """Ids of the layer's resident experts, ascending; any thread may ask. Waits."""
        # From the device alone: `on_host` belongs to whoever is between `pull` and `push`.
        first = 1 + self.num_experts[layer]
        slot_of = self.state[layer, first : first + self.num_experts[layer]].cpu().numpy()
        return np.flatnonzero(slot_of >= 0).tolist()

    def push(self, layer: int) -> None:
        """Copy the host's `Residency` of *layer* to the device."""
        row = to_device(torch.from_numpy(pack(self.on_host[layer])), self.state.device)
        self.state[layer, : row.shape[0]].copy_(row)

    def forget_prefetches(self, but: Sequence[Collection[int]]) -> None:
        """Count no prefetch of before as used later, but those of *but*, by layer."""
        for layer, (experts, slots) in enumerate(zip(self.num_experts, self.capacity, strict=True)):
            end = packed_length(experts, slots)
            unused = self.state[layer, end - experts : end]
            spared = list(but[layer])
            kept = unused[spared]
            unused.zero_()
            unused[spared] = kept

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


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor to *device*, in the order of its stream, without waiting."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def to_counters(counts: np.ndarray) -> Counters:
    """
    Read the device's counts, which are all of the completion's phase.

    Args:
        counts: int64 ``(layers + 1, 5)``, as `DeviceResidency.counts`.
    """
    values = Counters(len(counts) - 1).to_dict()
    for name, field in _FIELDS.items():
        values[name][COMPLETION] = counts[:-1, field].tolist()
    for field, name in enumerate(("tokens", "forwards", "zero_miss_forwards", "zero_miss_tokens")):
        values[name][COMPLETION] = int(counts[-1, field])
    return Counters.from_dict(values)
