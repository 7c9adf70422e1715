"""
The reference engine: the host decides, layer by layer, which experts are loaded.

In each layer it waits for the router's choice, asks `melinoe.cache.residency`, copies what is
missing into slots, and lets transformers' own function compute from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from melinoe.cache.counters import Counters
from melinoe.cache.policy import Policy
from melinoe.cache.residency import Decision, Load, Residency, StreamedPrefill
from melinoe.cache.timing import LoadRule
from melinoe.engine.checks import Guard
from melinoe.engine.misses import HostExperts, Misses
from melinoe.engine.passes import ForwardPasses, request_of, watch_generate
from melinoe.engine.transfer import (
    CudaTransfer,
    DiskTransfer,
    EmulatedLink,
    Transfer,
    read_by_threads,
    staging_blocks,
)
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.dispatch import experts_function
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, empty_blocks, read_block


class ReferenceEngine:
    """Let the host decide what is loaded; changes nothing of the model before `plug_in`."""

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
        self.transfer, self._reads_ahead = Transfer(store, link), False
        if device.type == "cuda":
            self.transfer = CudaTransfer(store, device)
        elif store.kind == "disk" and link is None and read_by_threads(layers):
            loads = misses.kind != "cpu"  # else nothing is loaded on demand, so none is read ahead
            self.transfer = DiskTransfer(store, layers, staging_blocks(slots) if loads else 0)
            self._reads_ahead = loads
        buffers: dict[Any, dict[str, Tensor]] = {}
        self.experts = [
            ExpertCache(layer, count, make(), self.transfer, self.passes, device)
            for layer, count, make in zip(layers, slots, policies, strict=True)
        ]
        for cache in self.experts:
            cache.peers = self.experts
        if misses.rule is not None:
            for cache in self.experts:
                cache.rule = misses.rule
                cache.host = HostExperts(cache.layer, store, device, self.transfer, buffers)

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
        with ExitStack() as undo:
            undo.callback(watch_generate(model, self.passes))
            if self._reads_ahead:
                undo.callback(self.passes.ask_next_routers())
            return undo.pop_all().close

    def counters(self) -> Counters:
        """A copy of what was counted."""
        return self.passes.counters.copy()

    def reset_counters(self) -> None:
        """Count from zero."""
        self.passes.counters.reset()
        self.transfer.reset()

    @contextmanager
    def every_step_seen(self) -> Iterator[None]:
        """The host sees every step as it is."""
        yield

    def finish(self) -> None:
        """Return when no copy is under way."""
        self.transfer.finish()

    def close(self) -> None:
        """Nothing stands in the weights' place but the slots."""


class ExpertCache:
    """
    The experts of one MoE layer, computed from its slots. *rule*: how many of a request's missing
    experts are loaded, None for all; *host* computes the others. *peers*: those of all layers, for
    reading ahead.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        num_slots: int,
        policy: Policy,
        transfer: Transfer,
        passes: ForwardPasses,
        device: torch.device,
    ) -> None:
        self.layer = layer
        self.nbytes = num_slots * layer.block_bytes
        self.residency = Residency(layer.num_experts, num_slots, policy)
        self.rule: LoadRule | None = None
        self.host: HostExperts | None = None
        self.peers: Sequence[ExpertCache] = ()
        self._index, self._num_experts, self._num_slots = layer.index, layer.num_experts, num_slots
        self._transfer, self._passes, self._counters = transfer, passes, passes.counters
        with torch.inference_mode(False):
            self.slots = (
                empty_blocks(layer.parts, num_slots)
                if device.type == "cpu"
                else {
                    part.name: torch.empty(num_slots, *part.shape, dtype=part.dtype, device=device)
                    for part in layer.parts
                }
            )
            # Shares the residency's memory: on the CPU it is always up to date.
            self._host_slot_of = torch.from_numpy(self.residency.slot_of)
            self._slot_of = self._host_slot_of.to(device, copy=device.type != "cpu")
        transfer.adopt(self.slots.values())
        self._views = [
            {name: tensor[slot] for name, tensor in self.slots.items()} for slot in range(num_slots)
        ]
        self._device, self._dtype = device, layer.pair_dtype
        self._forward = self._own_function = experts_function(layer)
        self._stand_in = StandIn(layer.module, self.slots, num_slots)
        self._guard = Guard(device, layer.module, [tensor.name for tensor in layer.tensors])
        self.watch = self._guard.watch
        self._in_flight: dict[int | None, Any] = {}  # expert -> ticket of its prefetch
        self._turn: Mapping[int, int] | None = None  # slots of the experts that are computed now
        self._as_numbered = False  # whether slot i holds expert i, for all i

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the layer's experts; shapes as for `melinoe.moe.dispatch.bind`."""
        self._guard.check(hidden_states, top_k_weights)
        if not top_k_index.shape[0]:  # no token came this way: no pass, no request
            return torch.zeros_like(hidden_states)
        with self._passes.lock:
            self._passes.enter(self._index, top_k_index)
            try:
                return self._compute(hidden_states, top_k_index, top_k_weights)
            except BaseException:
                self.reset()  # what was decided may not have been copied: trust no slot
                raise

    def compute_by(self, function: Callable[..., Tensor] | None) -> None:
        """Let *function* compute from the slots, called as `StandIn`'s; None: the format's own."""
        self._forward = self._own_function if function is None else function

    def expert_of(self) -> Tensor:
        """Give the expert that each slot holds for the computation at hand; -1 for none."""
        if self._turn is None:
            return torch.from_numpy(self.residency.expert_of).to(self._device)
        expert_of = torch.full((self._num_slots,), -1, dtype=torch.int64, device="cpu")
        for expert, slot in self._turn.items():
            expert_of[slot] = expert
        return expert_of.to(self._device)

    def resident(self) -> list[int]:
        """Ids of the resident experts, ascending; any thread may ask at any time."""
        return np.flatnonzero(self.residency.slot_of >= 0).tolist()

    def read(self, expert: int) -> dict[str, Tensor]:
        """One expert as the store holds it, on the host."""
        return read_block(self.layer, self._transfer.store, expert)

    def prefetch(self, experts: Sequence[int]) -> int:
        """Begin to load *experts*; as `Residency.prefetch`. Returns how many loads that takes."""
        loads = self.residency.prefetch(experts).loads
        if loads:
            try:
                ticket = self._transfer.issue(self._index, loads, self._views)
            except BaseException:
                self.reset()
                raise
            self._make_way(loads)
            if ticket is not None:
                self._in_flight.update((load.expert, ticket) for load in loads)
        return len(loads)

    def release(self) -> None:
        """Free the slots: nothing is computed from them any more."""
        self.slots, self._views, self.host = {}, [], None
        del self._stand_in

    def reset(self) -> None:
        """Forget who is resident; the counters stay."""
        # Copies that are under way still land, but before any that is issued from now on.
        self._in_flight.clear()
        self.residency.reset()
        self._renumber()

    # --- inner ----------------------------------------------------------------------------------

    def _compute(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts, uses, whole = request_of(top_k_index, self._num_experts)
        fits, on_host = len(experts) <= self._num_slots, tuple[int, ...]()
        decisions: Iterable[Decision]
        if self.rule is not None:
            decision, on_host = self.residency.request_with_host(experts, uses, load=self.rule)
            decisions, fits = (decision,), True
        else:
            decisions = self.residency.request_in_parts(experts, uses)
        turns = []
        for decision in decisions:  # a later one may take the slots of an earlier one
            slots = {expert: int(self.residency.slot_of[expert]) for expert in decision.hits}
            slots |= {load.expert: load.slot for load in decision.loads}
            turns.append((decision, slots))
        one_by_one = self._transfer.overlaps and bool(turns[0][0].loads)
        pairs, ids = None, np.empty(0, np.int64)
        if not whole or not fits or on_host or one_by_one:
            pairs = Pairs(hidden_states, top_k_index.shape[1], self._dtype)
            ids = top_k_index.reshape(-1).cpu().numpy()
        if self._transfer.overlaps:
            loaded = {load.expert for decision, _ in turns for load in decision.loads}
            self._transfer.forget_ahead(self._index, but=loaded)
        for number, (decision, slots) in enumerate(turns, start=1):
            ticket = None
            if decision.loads:
                self._make_way(decision.loads)
                ticket = self._transfer.issue(self._index, decision.loads, self._views, stalls=True)
            if number < len(turns):
                self._transfer.ahead(self._index, [load.expert for load in turns[number][0].loads])
            else:
                self._served(experts)
            if on_host:
                assert self.host is not None and pairs is not None
                self.host.add_to(pairs, ids, on_host)
            for arrived in self._arriving(decision, ticket):
                if pairs is not None and arrived:
                    self._add_from_slots(pairs, {one: slots[one] for one in arrived}, ids)
        made = [decision for decision, _ in turns]
        self._counters.add_decisions(self._index, experts, uses, made, on_host)
        if pairs is not None:
            return pairs.total(top_k_weights)
        if not self._as_numbered:
            top_k_index = self._slot_of.take(top_k_index.long())
        return self._forward(self._stand_in, hidden_states, top_k_index, top_k_weights)

    def _arriving(self, decision: Decision, ticket: Any) -> Iterator[list[int]]:
        """Wait for a decision's experts, and yield them in the groups in which they come."""
        for expert in decision.hits if self._in_flight else ():
            self._transfer.wait(self._in_flight.pop(expert, None))
        if self._transfer.overlaps:
            yield list(decision.hits)
            yield from self._transfer.arrivals(ticket)
        else:
            self._transfer.wait(ticket)
            yield [*decision.hits, *(load.expert for load in decision.loads)]

    def _add_from_slots(self, pairs: Pairs, slots: Mapping[int, int], ids: np.ndarray) -> None:
        """Compute the pairs of some experts from their *slots*; *ids* are each pair's expert."""
        slot_of = np.full(self._num_experts, -1)
        slot_of[list(slots)] = list(slots.values())
        known = (ids >= 0) & (ids < self._num_experts)
        slot_of_pair = np.where(known, slot_of[np.where(known, ids, 0)], -1)
        due = np.flatnonzero(slot_of_pair >= 0)
        self._turn = slots
        on_device = (torch.from_numpy(one).to(self._device) for one in (slot_of_pair, due))
        pairs.add(self._forward, self._stand_in, *on_device)
        self._turn = None

    def _served(self, experts: list[int]) -> None:
        """The loads of a request are under way: now others may follow them."""
        if experts and self._transfer.overlaps and self._passes.early is not None:
            self.peers[self._index + 1].read_ahead(self._passes.early)

    def read_ahead(self, guess: Tensor) -> None:
        """Begin to read what *guess* ``(tokens, top_k)`` says this layer will load."""
        if guess.shape[0] == 1:
            order = guess[0].tolist()
        else:  # a request of many tokens loads the least used first
            ids, counts = guess.unique(return_counts=True)
            order = ids[counts.argsort(stable=True)].tolist()
        slot_of = self.residency.slot_of
        missing = [one for one in order if 0 <= one < self._num_experts and slot_of[one] < 0]
        self._transfer.guess(self._index, missing)

    def _make_way(self, loads: Sequence[Load]) -> None:
        """Bring the books up to date with *loads*."""
        # Transfers keep their order, so a prefetch to the same slot cannot land after these.
        for load in loads if self._in_flight else ():
            self._in_flight.pop(load.evicted, None)
        # Before copies on demand, as on CUDA it makes the host wait for the computation.
        self._renumber()

    def _renumber(self) -> None:
        """The residency has changed: bring what is derived from it up to date."""
        if self._device.type != "cpu":
            self._slot_of.copy_(self._host_slot_of)
        if self._num_slots == self._num_experts:
            self._as_numbered = bool(
                (self.residency.expert_of == np.arange(self._num_experts)).all()
            )
