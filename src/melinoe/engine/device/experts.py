"""Compute one layer's experts from slots; the device decides what is loaded, or else the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.cache.residency import Residency, StreamedPrefill
from melinoe.engine.checks import Guard
from melinoe.engine.device import compiled
from melinoe.engine.device.loading import Loader, addresses
from melinoe.engine.device.passes import DEVICE, STREAM, DevicePasses
from melinoe.engine.device.residency import DeviceResidency, to_device
from melinoe.engine.device.staging import Staging, unpacked_slots
from melinoe.engine.device.support import grouped_mm_waits
from melinoe.errors import AttachError
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.dispatch import transformers_function
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, read_weights

_KEEP = StreamedPrefill(admit=0)
# Up to so many (token, choice) pairs are multiplied by `batched_mm` where the grouped product waits
# for the host: it can be captured, but copies two thirds of an expert for each pair.
FEW_PAIRS = 32


class DeviceExperts:
    """
    Computes the experts of one MoE layer from its slots, without asking the host in a decode step.

    Args:
        layer: the layer; its module's weights are taken out after this is made.
        residencies: of all layers.
        store: holds the experts; readable by the device.
        staging: shared by all layers.
        passes: shared by all layers.
        prefill: returns the rule by which prompts are streamed.
        device: where the slots are.

    Attributes:
        slots: by name, the parameters of the experts in slots, ``(num_slots, ...)``.
        traced: whether ``torch.compile`` is to see the arithmetic; see `device.compiled`.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        residencies: DeviceResidency,
        store: Store,
        staging: Staging,
        passes: DevicePasses,
        prefill: Callable[[], StreamedPrefill],
        device: torch.device,
    ) -> None:
        self.layer = layer
        self._index, self._num_experts = layer.index, layer.num_experts
        self._residencies, self._store, self._staging = residencies, store, staging
        self._passes, self._prefill, self._device = passes, prefill, device
        self._num_slots = residencies.capacity[layer.index]
        self._is_last = layer.index == len(residencies.capacity) - 1
        with torch.inference_mode(False):
            # Zeros, because a choice of no expert computes some slot, with weight zero.
            self.slots = unpacked_slots(layer, store, self._num_slots, device)
        staging.adopt(*self.slots.values())
        where = addresses(store, layer.index, device)
        blocks = staging.blocks(layer, store)
        self._loader = Loader(store, layer, where, self.slots)
        self._through = [Loader(store, layer, where, block) for block in blocks]
        self._forward = self._of_few = transformers_function(layer.module)
        if device.type == "cuda" and grouped_mm_waits(
            torch.cuda.get_device_capability(device), layer.tensors[0].dtype
        ):
            self._of_few = ALL_EXPERTS_FUNCTIONS["batched_mm"]
        self._stand_in = StandIn(layer.module, self.slots, self._num_slots)
        self._staged = [StandIn(layer.module, block, staging.experts) for block in blocks]
        self._dtype = self.slots["down_proj"].dtype
        self._guard = Guard(device, layer.module, list(self.slots))
        self.watch = self._guard.watch
        self._number = compiled.register(self)
        self.traced = False

    @property
    def residency(self) -> Residency:
        """Copy to the host which experts are resident now; waits for the device."""
        return self._residencies.pull(self._index)

    def resident(self) -> list[int]:
        """Ids of the resident experts, ascending; see `DeviceResidency.resident`."""
        return self._residencies.resident(self._index)

    @property
    def loaders(self) -> list[Loader]:
        """Loaders into the slots, and into the two staging blocks."""
        return [self._loader, *self._through]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._num_slots * self.layer.block_bytes

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Compute the layer's experts; see `melinoe.moe.dispatch.bind` for the shapes.

        Raises:
            AttachError: gradients are wanted; the model was moved or cast since `attach`; or a
                CUDA graph captures a pass that the host must decide.
        """
        if self.traced and torch.compiler.is_dynamo_compiling():
            return self._traced(hidden_states, top_k_index, top_k_weights)
        self._guard.check(hidden_states, top_k_weights)
        if not top_k_index.shape[0]:  # no token came this way: no pass, no request
            return torch.zeros_like(hidden_states)
        with self._passes.lock:
            self._passes.enter(self._index, top_k_index)
            with self._at_work():
                how = self._on_device if self._passes.mode == DEVICE else self._with_host
                return how(hidden_states, top_k_index, top_k_weights)

    def bring(self, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        """
        Bring the chosen experts into slots; a compiled step computes them there.

        Returns:
            Slots, int64, and weights, both shaped as *top_k_index*.

        Raises:
            AttachError: as when called; or the host must decide this pass.
        """
        self._guard.check(top_k_weights, top_k_weights)
        self._passes.enter(self._index, top_k_index)
        if self._passes.mode != DEVICE:
            raise AttachError(
                f"a compiled step of {top_k_index.shape[0]} tokens may need more experts of a "
                "layer than it has slots; raise the slots, or leave compile out"
            )
        with self._at_work():
            return self._bring(top_k_index, top_k_weights)

    def read(self, expert: int) -> dict[str, Tensor]:
        """Read one expert from the store, to the host, as a slot holds it."""
        return read_weights(self.layer, self._store, expert)

    def prefetch(self, experts: Sequence[int]) -> int:
        """Load *experts*, the most wanted first; returns the number of loads."""
        with self._at_work():
            loads = self._residencies.pull(self._index).prefetch(experts).loads
            self._loader.load([(load.expert, load.slot) for load in loads])
            self._residencies.push(self._index)
        self._passes.prefetched(self._index, [load.expert for load in loads])
        return len(loads)

    def reset(self) -> None:
        """Empty all slots of the layer; the counters stay."""
        self._residencies.pull(self._index).reset()
        self._residencies.push(self._index)

    def release(self) -> None:
        """Free the slots and staging blocks: nothing is computed from them any more."""
        self.slots = {}
        del self._stand_in, self._staged, self._loader, self._through
        self._staging.release()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Make the device current, as Triton needs; trust no slot after an exception."""
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else None
        try:
            with on_device or nullcontext():
                yield
        except BaseException:
            if not _capturing(self._device):  # capturing runs nothing, so nothing is half done
                self._staging.arrive()  # a copy under way must not land on a later one
                self._residencies.reset()  # what was decided may not have been copied
            raise

    # --- decided by the device ------------------------------------------------------------------

    def _on_device(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        slots, weights = self._bring(top_k_index, top_k_weights)
        return self._product(slots)(self._stand_in, hidden, slots, weights)

    def _bring(self, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Decide and copy. Nothing here depends on what a tensor holds, so it can be captured."""
        # The kernel could not refuse: it would write beyond its lists.
        assert min(top_k_index.numel(), self._num_experts) <= self._num_slots
        at, all_layers = self._index, self._residencies
        decided = all_layers.decide(at, top_k_index, top_k_weights)
        self._loader.load_listed(
            all_layers.load_expert[at], all_layers.load_slot[at], all_layers.num_loads[at : at + 1]
        )
        if self._is_last:
            all_layers.close_step(top_k_index.shape[0])
        return decided

    def _product(self, slots: Tensor) -> Callable[..., Tensor]:
        """Choose transformers' experts function for a step with these (token, choice) pairs."""
        return self._of_few if slots.numel() <= FEW_PAIRS else self._forward

    def _traced(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Show the compiler a layer: one operation, or in bfloat16 one and the arithmetic."""
        if self._dtype != torch.bfloat16:
            # Compiled, transformers' grouped_mm asks the host for all other types.
            return compiled.experts(hidden, top_k_index, top_k_weights, self._number)
        slots, weights = compiled.bring(top_k_index, top_k_weights, self._number)
        return self._product(slots)(self._stand_in, hidden, slots, weights)

    # --- decided by the host --------------------------------------------------------------------

    def _with_host(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute a prompt, or a step whose experts may not fit the slots."""
        if _capturing(self._device):
            raise AttachError(
                f"a CUDA graph is to hold a pass of {hidden.shape[0]} tokens, which may need more "
                "experts of a layer than it has slots; capture smaller passes, or raise the slots"
            )
        ids = top_k_index.reshape(-1).cpu().numpy()
        known = ids[(ids >= 0) & (ids < self._num_experts)]
        uses = np.bincount(known, minlength=self._num_experts)
        experts = uses.nonzero()[0].tolist()
        flat = top_k_index.reshape(-1).long()
        if known.size != ids.size:  # no expert is one more
            flat = torch.where((flat >= 0) & (flat < self._num_experts), flat, self._num_experts)
        pairs = Pairs(hidden, top_k_index.shape[1], self._dtype)
        residency = self._residencies.pull(self._index)
        if self._passes.mode == STREAM:
            self._stream(residency, experts, uses, pairs, flat)
        else:
            self._in_parts(residency, experts, uses[experts].tolist(), pairs, flat)
        self._residencies.push(self._index)
        return pairs.total(top_k_weights)

    def _in_parts(
        self, residency: Residency, experts: list[int], uses: list[int], pairs: Pairs, flat: Tensor
    ) -> None:
        """Compute part by part, as the reference engine."""
        decisions = []
        for decision in residency.request_in_parts(experts, uses):
            decisions.append(decision)
            self._loader.load([(load.expert, load.slot) for load in decision.loads])
            present = [*decision.hits, *(load.expert for load in decision.loads)]
            due = np.full(self._num_experts + 1, -1)
            due[present] = residency.slot_of[present]
            pairs.add(self._forward, self._stand_in, self._to_device(due)[flat])
        self._passes.counters.add_decisions(self._index, experts, uses, decisions)

    def _stream(
        self, residency: Residency, experts: list[int], uses: np.ndarray, pairs: Pairs, flat: Tensor
    ) -> None:
        """
        Compute a prompt in rounds: the residents first; while one round is computed, the next is
        copied, into the slots of admitted experts or into a staging block.
        """
        rule = _KEEP if self._passes.paged else self._prefill()
        stream = rule.serve(residency, experts, uses[experts].tolist())
        self._passes.counters.add_stream(self._index, experts, uses[experts].tolist(), stream)
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
        round_of, slot_of = self._to_device(table)
        order = torch.argsort(round_of[flat], stable=True)
        slot_of_pair = slot_of[flat]
        done: list[object] = [None, None]
        begin = 0
        self._staging.begin()
        for number, members in enumerate(rounds):
            block = (number - in_slots) % 2
            staged = number >= in_slots
            if number:
                with self._staging.copying(done[block] if staged else None):
                    (self._through[block] if staged else self._loader).load(members)
                self._staging.arrive()
            end = begin + int(sum(uses[expert] for expert, _ in members))
            stand_in = self._staged[block] if staged else self._stand_in
            pairs.add(self._forward, stand_in, slot_of_pair, order[begin:end])
            if staged:
                done[block] = self._staging.mark()
            begin = end

    def _to_device(self, table: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(table), self._device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
