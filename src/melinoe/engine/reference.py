"""
The reference engine: the host decides, layer by layer, which experts are loaded.

In each layer it waits for the router's choice, asks `melinoe.cache.residency` what to load, copies
that into the slots, and lets transformers' own function compute from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from melinoe.cache.counters import Counters
from melinoe.cache.policy import Policy
from melinoe.cache.residency import Decision, Load, Residency, StreamedPrefill
from melinoe.cache.timing import LoadRule
from melinoe.engine.checks import Guard
from melinoe.engine.misses import HostExperts, Misses
from melinoe.engine.passes import ForwardPasses, watch_generate
from melinoe.engine.transfer import EmulatedLink, Transfer, transfer_for
from melinoe.experts.format import Part
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.dispatch import experts_function
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, read_block


class ReferenceEngine:
    """
    Let the host decide what is loaded; see `melinoe.engine.handle.Engine`.

    Args:
        model: A transformers model.
        layers: Its MoE layers, with their weights.
        store: Holds their experts.
        slots: Of each layer.
        policies: By layer, a function that makes its policy.
        device: Where the slots are.
        link: The emulated link, if any.
        misses: What is done about a miss.
    """

    name = "reference"
    asks_host = True
    prefill: StreamedPrefill | None = None
    graphs = None

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertsLayer],
        store: Store,
        slots: Sequence[int],
        policies: Sequence[Callable[[], Policy]],
        device: torch.device,
        link: EmulatedLink | None,
        misses: Misses,
    ) -> None:
        self.passes = ForwardPasses(model, Counters(len(layers)))
        self.transfer = transfer_for(store, device, link)
        rule, threads = misses.rule, misses.threads
        buffers: dict[tuple[Part, ...], dict[str, Tensor]] = {}
        self.experts = [
            ExpertCache(
                layer, count, make(), self.transfer, self.passes, device, rule,
                HostExperts(layer, store, threads, device, self.transfer, buffers=buffers)
                if rule else None,
            )
            for layer, count, make in zip(layers, slots, policies, strict=True)
        ]  # fmt: skip

    @property
    def stall_s(self) -> float:
        """Seconds for which forward passes waited for experts."""
        return self.transfer.stall_s

    @property
    def host_s(self) -> float:
        """Seconds for which the host computed missing experts."""
        return self.transfer.host_s

    @property
    def transferred_bytes(self) -> int:
        """Bytes copied into slots, on demand and by prefetches."""
        return self.transfer.transferred_bytes

    def plug_in(self, model: nn.Module) -> Callable[[], None]:
        """Learn of ``generate``, and keep it from compiling."""
        return watch_generate(model, self.passes)

    def counters(self) -> Counters:
        """A copy of what was counted."""
        return self.passes.counters.copy()

    def reset_counters(self) -> None:
        """Count from zero."""
        self.passes.counters.reset()
        self.transfer.reset()

    def forget_prefetches(self, but: Sequence[Collection[int]]) -> None:
        """Let no prefetch count any more, except those in *but*, by layer."""
        for cache, spared in zip(self.experts, but, strict=True):
            cache.residency.forget_prefetches(but=spared)

    @contextmanager
    def every_step_seen(self, counting: bool) -> Iterator[None]:
        """The host sees every step as it is."""
        yield

    def finish(self) -> None:
        """Return when no copy is under way."""
        self.transfer.finish()

    def close(self) -> None:
        """Nothing stands in the weights' place but the slots."""


class ExpertCache:
    """
    The experts of one MoE layer, computed from its slots.

    Args:
        layer: Its module's weights are taken out after this is made.
        num_slots: Between 1 and the layer's number of experts.
        policy: Of this layer alone.
        transfer: Shared by all layers.
        passes: Shared by all layers; also holds the counters.
        device: Where the slots are.
        rule: How many of a request's missing experts are loaded; absent: all.
        host: Computes the others; needed with a *rule*.

    Attributes:
        after_request: Called with the layer and its experts once a request's loads are under way.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        num_slots: int,
        policy: Policy,
        transfer: Transfer,
        passes: ForwardPasses,
        device: torch.device,
        rule: LoadRule | None = None,
        host: HostExperts | None = None,
    ) -> None:
        self.layer = layer
        self.nbytes = num_slots * layer.block_bytes
        self.residency = Residency(layer.num_experts, num_slots, policy)
        self._index, self._num_experts, self._num_slots = layer.index, layer.num_experts, num_slots
        self._transfer, self._passes, self._counters = transfer, passes, passes.counters
        with torch.inference_mode(False):
            self.slots = {
                part.name: torch.empty((num_slots, *part.shape), dtype=part.dtype, device=device)
                for part in layer.parts
            }
            # Shares the residency's memory: on the CPU it is always up to date.
            self._host_slot_of = torch.from_numpy(self.residency.slot_of)
            self._slot_of = self._host_slot_of.to(device, copy=device.type != "cpu")
        transfer.adopt(self.slots.values())
        self._views = [
            {name: tensor[slot] for name, tensor in self.slots.items()} for slot in range(num_slots)
        ]
        self._dtype = layer.pair_dtype
        self._device = device
        self._forward = experts_function(layer)
        self._stand_in = StandIn(layer.module, self.slots, num_slots)
        self._rule, self._host = rule, host
        self._guard = Guard(device, layer.module, [tensor.name for tensor in layer.tensors])
        self.watch = self._guard.watch
        self._in_flight: dict[int, Any] = {}  # expert -> ticket of its prefetch
        self._as_numbered = False  # whether slot i holds expert i, for all i
        self.after_request: Callable[[int, list[int]], None] | None = None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Compute the layer's experts; see `melinoe.moe.dispatch.bind` for the shapes.

        Raises:
            AttachError: as `Guard.check`.
        """
        self._guard.check(hidden_states, top_k_weights)
        if not top_k_index.shape[0]:  # no token came this way: no pass, no request
            return torch.zeros_like(hidden_states)
        with self._passes.lock:
            self._passes.enter(self._index, top_k_index, top_k_weights)
            try:
                return self._compute(hidden_states, top_k_index, top_k_weights)
            except BaseException:
                self.reset()  # what was decided may not have been copied: trust no slot
                raise

    def resident(self) -> list[int]:
        """Ids of the resident experts, ascending."""
        return np.flatnonzero(self.residency.slot_of >= 0).tolist()

    def read(self, expert: int) -> dict[str, Tensor]:
        """One expert as the store holds it, on the host."""
        return read_block(self.layer, self._transfer.store, expert)

    def prefetch(self, experts: Sequence[int], spare: Collection[int] = ()) -> int:
        """Begin to load *experts*; as `Residency.prefetch`. Returns how many loads that takes."""
        decision = self.residency.prefetch(experts, spare)
        if decision.loads:
            try:
                ticket = self._transfer.issue(self._index, decision.loads, self._views)
            except BaseException:
                self.reset()
                raise
            for load in decision.loads:
                self._in_flight.pop(load.evicted, None)  # type: ignore[arg-type]
                if ticket is not None:
                    self._in_flight[load.expert] = ticket
            self._renumber()
            self._passes.prefetched(self._index, [load.expert for load in decision.loads])
        return len(decision.loads)

    def release(self) -> None:
        """Free the slots: nothing is computed from them any more."""
        self.slots, self._views = {}, []
        del self._stand_in, self._host

    def reset(self) -> None:
        """Forget who is resident; the counters stay."""
        # Copies that are under way still land, but before any that is issued from now on.
        self._in_flight.clear()
        self.residency.reset()
        self._renumber()

    # --- inner ----------------------------------------------------------------------------------

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        request = _request_of(top_k_index, self._num_experts)
        if self._rule is not None:
            return self._partly(request, hidden_states, top_k_index, top_k_weights)
        experts, uses, whole = request
        if not whole or len(experts) > self._num_slots:
            return self._in_parts(request, hidden_states, top_k_index, top_k_weights)
        decision = self.residency.request(experts)
        if decision.loads:
            self._make_way(decision.loads)
            self._transfer.demand(self._index, decision.loads, self._views)
        self._await(decision.hits)
        self._counters.add_decisions(self._index, experts, uses, (decision,))
        self._served(experts)
        return self._from_slots(hidden_states, top_k_index, top_k_weights)

    def _in_parts(
        self,
        request: _Request,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Compute in several turns, or with choices of no expert."""
        experts, uses, _ = request
        pairs = Pairs(hidden_states, top_k_index.shape[1], self._dtype)
        flat = self._flat(top_k_index)
        decisions = []
        for decision in self.residency.request_in_parts(experts, uses):
            decisions.append(decision)
            if decision.loads:
                self._make_way(decision.loads)
                self._transfer.demand(self._index, decision.loads, self._views)
            self._await(decision.hits)
            if len(experts) <= self._num_slots:  # else more turns come, and more loads with them
                self._served(experts)
            self._add_from_slots(pairs, decision, flat)
        if len(experts) > self._num_slots:
            self._served(experts)
        self._counters.add_decisions(self._index, experts, uses, decisions)
        return pairs.total(top_k_weights)

    def _partly(
        self,
        request: _Request,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Load some of the missing; meanwhile the host computes the others."""
        assert self._rule is not None and self._host is not None
        experts, uses, whole = request
        decision, on_host = self.residency.request_with_host(experts, uses, load=self._rule)
        ticket = None
        if decision.loads:
            self._make_way(decision.loads)
            issue = self._transfer.begin_demand if on_host or not whole else self._transfer.demand
            ticket = issue(self._index, decision.loads, self._views)
        if whole and not on_host:
            self._await(decision.hits)
            self._counters.add_decisions(self._index, experts, uses, (decision,), on_host)
            self._served(experts)
            return self._from_slots(hidden_states, top_k_index, top_k_weights)
        pairs = Pairs(hidden_states, top_k_index.shape[1], self._dtype)
        self._served(experts)
        if on_host:
            self._host.add_to(pairs, top_k_index.reshape(-1).cpu().numpy(), on_host)
        if ticket is not None:
            self._transfer.await_prefetched(ticket)
        self._await(decision.hits)
        if decision.hits or decision.loads:
            self._add_from_slots(pairs, decision, self._flat(top_k_index))
        self._counters.add_decisions(self._index, experts, uses, (decision,), on_host)
        return pairs.total(top_k_weights)

    def _from_slots(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Compute all at once: every choice is of an expert that has arrived in a slot."""
        if not self._as_numbered:
            top_k_index = self._slot_of.take(top_k_index.long())
        return self._forward(self._stand_in, hidden_states, top_k_index, top_k_weights)

    def _add_from_slots(self, pairs: Pairs, decision: Decision, flat: Tensor) -> None:
        """Compute the pairs of a decision's experts."""
        # The last entry means "not due", as -1 does for experts that are not in the decision.
        # On the host by name: the user's default device may be another.
        due = torch.full((self._num_experts + 1,), -1, dtype=torch.int64, device="cpu")
        here = [*decision.hits, *(load.expert for load in decision.loads)]
        present = torch.tensor(here, dtype=torch.int64, device="cpu")
        due[present] = self._host_slot_of[present]
        pairs.add(self._forward, self._stand_in, due.to(self._device)[flat])

    def _flat(self, top_k_index: Tensor) -> Tensor:
        """The choices in a row; those of no expert are `num_experts`."""
        flat = top_k_index.reshape(-1).long()
        known = (flat >= 0) & (flat < self._num_experts)
        return flat.masked_fill(~known, self._num_experts)

    def _served(self, experts: list[int]) -> None:
        """The loads of a request are under way: now others may follow them over the link."""
        if not experts:
            return
        self._passes.route.reached(self._index)
        if self.after_request is not None:
            self.after_request(self._index, experts)

    def _make_way(self, loads: Sequence[Load]) -> None:
        """Bring the books up to date before *loads* are copied."""
        if self._in_flight:
            # Transfers keep their order, so a prefetch to the same slot cannot land after this.
            for load in loads:
                self._in_flight.pop(load.evicted, None)  # type: ignore[arg-type]
        # First, because on CUDA it makes the host wait for the computation, now without the copies.
        self._renumber()

    def _await(self, hits: Sequence[int]) -> None:
        """Wait for those of *hits* whose prefetch is still under way."""
        for expert in hits if self._in_flight else ():
            ticket = self._in_flight.pop(expert, None)
            if ticket is not None:
                self._transfer.await_prefetched(ticket)

    def _renumber(self) -> None:
        """The residency has changed: bring what is derived from it up to date."""
        if self._device.type != "cpu":
            self._slot_of.copy_(self._host_slot_of)
        if self._num_slots == self._num_experts:
            self._as_numbered = bool(
                (self.residency.expert_of == np.arange(self._num_experts)).all()
            )


class _Request(NamedTuple):
    """Distinct ids ascending, how often each is used, and whether every choice is one."""

    experts: list[int]
    uses: list[int]
    whole: bool


def _request_of(top_k_index: Tensor, num_experts: int) -> _Request:
    """The request of ``top_k_index`` ``(tokens, top_k)``; other ids are no expert."""
    if top_k_index.shape[0] == 1:
        chosen = sorted(top_k_index.tolist()[0])
        distinct = len(set(chosen)) == len(chosen)
        if distinct and chosen[0] >= 0 and chosen[-1] < num_experts:
            return _Request(chosen, [1] * len(chosen), True)
    ids = top_k_index.reshape(-1).cpu().numpy()
    known = ids[(ids >= 0) & (ids < num_experts)]
    counts = np.bincount(known, minlength=num_experts)
    experts = counts.nonzero()[0]
    return _Request(experts.tolist(), counts[experts].tolist(), known.size == ids.size)
