"""One layer's slots at work: ask who must come, have it copied, let transformers compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.policy import Policy
from melinoe.cache.requests import mean_scores
from melinoe.cache.residency import Load, Residency
from melinoe.cache.shared import SharedLayer
from melinoe.errors import AttachError
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.dispatch import transformers_function
from melinoe.moe.experts import ExpertsLayer
from melinoe.runtime.common_slots import CommonSlots
from melinoe.runtime.passes import ForwardPasses
from melinoe.runtime.transfer import Transfer


class ExpertCache:
    """
    Computes the experts of one MoE layer from its slots.

    Args:
        layer: the layer; its module's weights are taken out after this is made.
        num_slots: between 1 and the layer's number of experts.
        policy: of this layer alone.
        transfer: shared by all layers.
        passes: shared by all layers; also holds the counters.
        device: where the slots are.
        common: the slots that all layers share; *num_slots* are then what this one brought in.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        num_slots: int,
        policy: Policy,
        transfer: Transfer,
        passes: ForwardPasses,
        device: torch.device,
        common: CommonSlots | None = None,
    ) -> None:
        self.layer = layer
        self._bytes = num_slots * layer.block_bytes
        self.residency: Residency | SharedLayer
        if common is None:
            self.residency = Residency(layer.num_experts, num_slots, policy)
            self._key = 0
        else:
            num_slots, self.residency = common.num_slots, common.residencies[layer.index]
            self._key = self.residency.key
        self._uses_scores = policy.uses_scores
        self._index = layer.index
        self._num_experts = layer.num_experts
        self._num_slots = num_slots
        self._transfer = transfer
        self._passes = passes
        self._counters = passes.counters
        with torch.inference_mode(False):
            self.slots = (
                common.tensors
                if common is not None
                else {
                    t.name: torch.empty((num_slots, *t.shape), dtype=t.dtype, device=device)
                    for t in layer.tensors
                }
            )
            # Shares the residency's memory: on the CPU it is always up to date.
            self._host_slot_of = torch.from_numpy(self.residency.slot_of)
            self._slot_of = self._host_slot_of.to(device, copy=device.type != "cpu")
        transfer.adopt(self.slots.values())
        self._views = [
            {name: tensor[slot] for name, tensor in self.slots.items()} for slot in range(num_slots)
        ]
        self._dtype = self.slots["down_proj"].dtype
        self._device = device
        self._forward = transformers_function(layer.module)
        self._stand_in = StandIn(layer.module, self.slots, num_slots)
        self._witness: tuple[Tensor, torch.dtype] | None = None
        # Expert -> ticket of its prefetch; named as the residency names those it evicts.
        self._in_flight: dict[int, Any] = {} if common is None else common.in_flight
        self._as_numbered = False  # whether slot i holds expert i, for all i

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's slots; of common ones, of its part."""
        return self._bytes

    def watch(self, parameter: Tensor) -> None:
        """Refuse to run once *parameter*, an empty one left in the module, is moved or cast."""
        self._witness = (parameter, parameter.dtype)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Compute the layer's experts; see `melinoe.moe.dispatch.bind` for the shapes.

        Raises:
            AttachError: gradients are wanted, or the model was moved or cast since `attach`.
        """
        self._check(hidden_states, top_k_weights)
        if not top_k_index.shape[0]:  # no token came this way: no pass, no request
            return torch.zeros_like(hidden_states)
        self._passes.enter(self._index, top_k_index, top_k_weights)
        try:
            return self._compute(hidden_states, top_k_index, top_k_weights)
        except BaseException:
            self.reset()  # what was planned may not have been copied: trust no slot
            raise

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts, uses, whole = self._request(top_k_index)
        scores = self._scores(experts, top_k_index, top_k_weights) if self._uses_scores else None
        if not whole or len(experts) > self._num_slots:
            return self._in_parts(experts, uses, scores, hidden_states, top_k_index, top_k_weights)
        plan = self.residency.request(experts, None, scores)
        if plan.loads:
            self._load(plan.loads)
        if self._in_flight:
            self._await(plan.hits)
        self._counters.add_plans(self._index, experts, uses, (plan,))
        if not self._as_numbered:
            top_k_index = self._slot_of.take(top_k_index.long())
        return self._forward(self._stand_in, hidden_states, top_k_index, top_k_weights)

    def prefetch(self, experts: Sequence[int]) -> int:
        """Begin to load *experts*, the most wanted first; returns how many loads that takes."""
        plan = self.residency.prefetch(experts)
        if plan.loads:
            try:
                ticket = self._transfer.issue(self._index, plan.loads, self._views)
            except BaseException:
                self.reset()
                raise
            for load in plan.loads:
                self._in_flight.pop(load.evicted, None)  # type: ignore[arg-type]
                if ticket is not None:
                    self._in_flight[self._key + load.expert] = ticket
            self._renumber()
        return len(plan.loads)

    def reset(self) -> None:
        """Forget who is resident; the counters stay."""
        # Copies that are under way still land, but before any that is issued from now on.
        self._in_flight.clear()
        self.residency.reset()
        self._renumber()

    # --- inner ----------------------------------------------------------------------------------

    def _in_parts(
        self,
        experts: list[int],
        uses: list[int],
        scores: list[float] | None,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Several plans, or choices of no expert."""
        pairs = Pairs(hidden_states, top_k_index.shape[1], self._dtype)
        flat = top_k_index.reshape(-1).long()
        known = (flat >= 0) & (flat < self._num_experts)
        flat = flat.masked_fill(~known, self._num_experts)  # the last entry below means "not due"
        plans = []
        for plan in self.residency.plans(experts, uses, scores):
            plans.append(plan)
            if plan.loads:
                self._load(plan.loads)
            if self._in_flight:
                self._await(plan.hits)
            due = torch.full((self._num_experts + 1,), -1, dtype=torch.int64)
            present = torch.tensor([*plan.hits, *(load.expert for load in plan.loads)]).long()
            due[present] = self._host_slot_of[present]
            pairs.add(self._forward, self._stand_in, due.to(self._device)[flat])
        self._counters.add_plans(self._index, experts, uses, plans)
        return pairs.total(top_k_weights)

    def _request(self, top_k_index: Tensor) -> tuple[list[int], list[int], bool]:
        """Distinct ids ascending, how often each is used, and whether every choice is one."""
        if top_k_index.shape[0] == 1:
            chosen = sorted(top_k_index.tolist()[0])
            distinct = len(set(chosen)) == len(chosen)
            if distinct and chosen[0] >= 0 and chosen[-1] < self._num_experts:
                return chosen, [1] * len(chosen), True
        ids = top_k_index.reshape(-1).cpu().numpy()
        known = ids[(ids >= 0) & (ids < self._num_experts)]
        counts = np.bincount(known, minlength=self._num_experts)
        experts = counts.nonzero()[0]
        return experts.tolist(), counts[experts].tolist(), known.size == ids.size

    def _scores(
        self, experts: list[int], top_k_index: Tensor, top_k_weights: Tensor
    ) -> list[float]:
        """How much the router wanted each of *experts*, the number that a trace would give."""
        ids = top_k_index.reshape(-1).cpu().numpy()
        weights = top_k_weights.reshape(-1).to(torch.float16).cpu().numpy()
        known = (ids >= 0) & (ids < self._num_experts)
        rows = top_k_index.shape[0]
        return mean_scores(ids[known], weights[known], rows, self._num_experts)[experts].tolist()

    def _load(self, loads: Sequence[Load]) -> None:
        if self._in_flight:
            # Transfers keep their order, so a prefetch to the same slot cannot land after this.
            for load in loads:
                self._in_flight.pop(load.evicted, None)  # type: ignore[arg-type]
        # First, because on CUDA it makes the host wait for the computation, now without the copies.
        self._renumber()
        self._transfer.demand(self._index, loads, self._views)

    def _await(self, hits: Sequence[int]) -> None:
        """Wait for those of *hits* whose prefetch is still under way."""
        for expert in hits:
            ticket = self._in_flight.pop(self._key + expert, None)
            if ticket is not None:
                self._transfer.await_prefetched(ticket)

    def _renumber(self) -> None:
        """The residency has changed: bring what is derived from it up to date."""
        if self._device.type != "cpu":
            self._slot_of.copy_(self._host_slot_of)
        if isinstance(self.residency, Residency) and self._num_slots == self._num_experts:
            self._as_numbered = bool(
                (self.residency.expert_of == np.arange(self._num_experts)).all()
            )

    def _check(self, hidden_states: Tensor, top_k_weights: Tensor) -> None:
        if hidden_states.requires_grad or top_k_weights.requires_grad:
            raise AttachError(
                "offloaded experts have no gradient; run the model under torch.no_grad(), or "
                "detach() the runtime to train"
            )
        if self._witness is None:
            return
        parameter, dtype = self._witness
        if parameter.dtype is not dtype or parameter.device != self._device:
            raise AttachError(
                f"the model was moved or cast (to {parameter.device}, {parameter.dtype}) after the "
                "runtime was attached; detach() first, then move it and attach again"
            )
