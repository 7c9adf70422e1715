"""Compute one layer's experts from slots; the device decides what is loaded, or else the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.residency import Residency, StreamedPrefill
from melinoe.engine.checks import Guard
from melinoe.engine.device.copying import Loader, Staging, addresses
from melinoe.engine.device.decide import DeviceResidency, to_device
from melinoe.engine.device.packed_kernels import FEW_PAIRS, KernelExperts
from melinoe.engine.device.passes import DEVICE, STREAM, DevicePasses
from melinoe.engine.device.support import grouped_mm_waits
from melinoe.engine.passes import request_of
from melinoe.errors import AttachError
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.dispatch import transformers_function
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, read_block

_KEEP = StreamedPrefill(admit=0)


class DeviceExperts:
    """
    Computes the experts of one MoE layer from its slots, without asking the host in a decode step.
    Packed experts are computed by our kernels; those of 16 and 32 bits by transformers' function,
    except in passes of few pairs where that makes the host wait.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        residencies: DeviceResidency,
        store: Store,
        staging: Staging,
        passes: DevicePasses,
        prefill: StreamedPrefill,
        device: torch.device,
    ) -> None:
        self.layer = layer
        self._index, self._num_experts = layer.index, layer.num_experts
        self._residencies, self._store, self._staging = residencies, store, staging
        self._passes, self._prefill, self._device = passes, prefill, device
        self._num_slots = residencies.capacity[layer.index]
        self._is_last = layer.index == len(residencies.capacity) - 1
        self.slots = staging.slots(layer, self._num_slots)
        where, blocks = addresses(store, layer.index, device), staging.blocks(layer)
        self.loaders = [Loader(store, layer.index, where, to) for to in (self.slots, *blocks)]
        self._forward = self._of_few = transformers_function(layer.module)
        if not layer.format.exact:
            self._forward = self._of_few = KernelExperts(layer)
        elif device.type == "cuda" and grouped_mm_waits(
            torch.cuda.get_device_capability(device), layer.pair_dtype
        ):
            self._of_few = KernelExperts(layer)
        self._stand_in = StandIn(layer.module, self.slots, self._num_slots)
        self._staged = [StandIn(layer.module, block, staging.experts) for block in blocks]
        self._guard = Guard(device, layer.module, [tensor.name for tensor in layer.tensors])
        self.watch = self._guard.watch

    @property
    def residency(self) -> Residency:
        """Copy to the host which experts are resident now; waits for the device."""
        return self._residencies.pull(self._index)

    def resident(self) -> list[int]:
        """Ids of the resident experts, ascending; see `DeviceResidency.resident`."""
        return self._residencies.resident(self._index)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._num_slots * self.layer.block_bytes

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the layer's experts; AttachError where a graph captures the host's pass."""
        self._guard.check(hidden_states, top_k_weights)
        if not top_k_index.shape[0]:  # no token came this way: no pass, no request
            return torch.zeros_like(hidden_states)
        with self._passes.lock:
            self._passes.enter(self._index, top_k_index)
            with self._at_work():
                how = self._on_device if self._passes.mode == DEVICE else self._with_host
                return how(hidden_states, top_k_index, top_k_weights)

    def read(self, expert: int) -> dict[str, Tensor]:
        """Read one expert from the store, to the host, as a slot holds it."""
        return read_block(self.layer, self._store, expert)

    def prefetch(self, experts: Sequence[int]) -> int:
        """Load *experts*, the most wanted first; returns the number of loads."""
        with self._at_work():
            loads = self._residencies.pull(self._index).prefetch(experts).loads
            self.loaders[0].load([(load.expert, load.slot) for load in loads])
            self._residencies.push(self._index)
        return len(loads)

    def reset(self) -> None:
        """Empty all slots of the layer; the counters stay."""
        self._residencies.pull(self._index).reset()
        self._residencies.push(self._index)

    def release(self) -> None:
        """Free the slots and staging blocks: nothing is computed from them any more."""
        self.slots, self.loaders = {}, []
        del self._stand_in, self._staged
        self._staging.release()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Make the device current, as Triton needs; trust no slot after an exception."""
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else None
        try:
            with on_device or nullcontext():
                yield
        except BaseException:
            if not self._capturing:  # capturing runs nothing, so nothing is half done
                self._staging.arrive()  # a copy under way must not land on a later one
                self._residencies.reset()  # what was decided may not have been copied
            raise

    @property
    def _capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _product(self, choice: Tensor) -> Callable[..., Tensor]:
        """The experts function of a pass with these (token, choice) pairs."""
        return self._of_few if choice.numel() <= FEW_PAIRS else self._forward

    def _on_device(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Let the device decide. Nothing depends on what a tensor holds: it can be captured."""
        # The kernel could not refuse: it would write beyond its lists.
        assert min(top_k_index.numel(), self._num_experts) <= self._num_slots
        at, layers = self._index, self._residencies
        slots, weights = layers.decide(at, top_k_index, top_k_weights)
        self.loaders[0].load_listed(
            layers.load_expert[at], layers.load_slot[at], layers.num_loads[at : at + 1]
        )
        if self._is_last:
            layers.close_step(top_k_index.shape[0])
        return self._product(slots)(self._stand_in, hidden, slots, weights)

    def _with_host(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute a prompt, or a step whose experts may not fit the slots."""
        if self._capturing:
            raise AttachError(
                f"a CUDA graph is to hold a pass of {hidden.shape[0]} tokens, which may need more "
                "experts of a layer than it has slots; capture smaller passes, or raise the slots"
            )
        experts, uses, whole = request_of(top_k_index, self._num_experts)
        flat = top_k_index.reshape(-1).long()
        if not whole:  # no expert is one more
            flat = torch.where((flat >= 0) & (flat < self._num_experts), flat, self._num_experts)
        pairs = Pairs(hidden, top_k_index.shape[1], self.layer.pair_dtype)
        residency = self._residencies.pull(self._index)
        how = self._stream if self._passes.mode == STREAM else self._in_parts
        how(residency, experts, uses, pairs, flat)
        self._residencies.push(self._index)
        product = self._product(flat)
        if isinstance(product, KernelExperts):  # in its order, as if all were in slots at once
            return product.combine(pairs.outputs, top_k_weights, hidden.dtype)
        return pairs.total(top_k_weights)

    def _in_parts(
        self, residency: Residency, experts: list[int], uses: list[int], pairs: Pairs, flat: Tensor
    ) -> None:
        """Compute part by part, as the reference engine."""
        decisions = []
        for decision in residency.request_in_parts(experts, uses):
            decisions.append(decision)
            self.loaders[0].load([(load.expert, load.slot) for load in decision.loads])
            present = [*decision.hits, *(load.expert for load in decision.loads)]
            due = np.full(self._num_experts + 1, -1)
            due[present] = residency.slot_of[present]
            pairs.add(self._product(flat), self._stand_in, to_device(due, self._device)[flat])
        self._passes.counters.add_decisions(self._index, experts, uses, decisions)

    def _stream(
        self, residency: Residency, experts: list[int], uses: list[int], pairs: Pairs, flat: Tensor
    ) -> None:
        """Compute a prompt in rounds; while one is computed, the next is copied."""
        rule = _KEEP if self._passes.paged else self._prefill
        stream = rule.serve(residency, experts, uses)
        self._passes.counters.add_stream(self._index, experts, uses, stream)
        of = dict(zip(experts, uses, strict=True))
        step = self._staging.experts
        placed = [(load.expert, load.slot) for load in stream.admitted]
        rounds = [[(expert, int(residency.slot_of[expert])) for expert in stream.hits]]
        rounds += [placed[at : at + step] for at in range(0, len(placed), step)]
        in_slots = len(rounds)
        rounds += [
            [(expert, place) for place, expert in enumerate(stream.passing[at : at + step])]
            for at in range(0, len(stream.passing), step)
        ]
        # Pairs sorted by round, on the device; how many each round has, the host knows.
        table = np.full((2, self._num_experts + 1), 0)
        table[0] = len(rounds)
        for number, members in enumerate(rounds):
            for expert, place in members:
                table[:, expert] = number, place
        round_of, slot_of = to_device(table, self._device)
        order = torch.argsort(round_of[flat], stable=True)
        slot_of_pair = slot_of[flat]
        done: list[object] = [None, None]
        begin = 0
        self._staging.begin()
        for number, members in enumerate(rounds):
            block, staged = (number - in_slots) % 2, number >= in_slots
            if number:
                with self._staging.copying(done[block] if staged else None):
                    self.loaders[1 + block if staged else 0].load(members)
                self._staging.arrive()
            end = begin + sum(of[expert] for expert, _ in members)
            stand_in = self._staged[block] if staged else self._stand_in
            pairs.add(self._product(flat), stand_in, slot_of_pair, order[begin:end])
            if staged:
                done[block] = self._staging.mark()
            begin = end
