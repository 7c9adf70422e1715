"""One layer's experts function: planned on the device, or with the host where that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from melinoe.cache.prefill import StreamedPrefill
from melinoe.cache.residency import Residency
from melinoe.engine.device import operations
from melinoe.engine.device.carrier import Carrier, FastStore, addresses_of
from melinoe.engine.device.passes import DEVICE, STREAM, FastPasses
from melinoe.engine.device.residency import DeviceResidency, to_device
from melinoe.engine.device.staging import Staging
from melinoe.engine.device.support import grouped_mm_waits
from melinoe.engine.guard import Guard
from melinoe.engine.store import read_expert
from melinoe.errors import AttachError
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.dispatch import transformers_function
from melinoe.moe.experts import ExpertsLayer

_KEEP = StreamedPrefill(admit=0)
# (token, choice) pairs that are few: where the grouped product waits for the host, theirs are
# multiplied by `batched_mm`, which can be captured but copies two thirds of an expert for each.
FEW_PAIRS = 32


class FastExperts:
    """
    Computes the experts of one MoE layer from its slots, without asking the host in a decode step.

    Args:
        layer: the layer; its module's weights are taken out after this is made.
        who: of all layers.
        store: holds the experts; readable by the device.
        staging: shared by all layers.
        passes: shared by all layers.
        prefill: gives the rule by which prompts are streamed.
        device: where the slots are.

    Attributes:
        traced: whether ``torch.compile`` is to see the arithmetic; see `device.compiled`.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        who: DeviceResidency,
        store: FastStore,
        staging: Staging,
        passes: FastPasses,
        prefill: Callable[[], StreamedPrefill],
        device: torch.device,
    ) -> None:
        self.layer = layer
        self._who, self._staging, self._passes, self._prefill = who, staging, passes, prefill
        self._index, self._num_experts = layer.index, layer.num_experts
        self._num_slots = who.capacity[layer.index]
        self._is_last = layer.index == len(who.capacity) - 1
        self._device = device
        with torch.inference_mode(False):
            # Numbers, because a choice of no expert computes some slot, with weight zero.
            self.slots = {
                t.name: torch.zeros((self._num_slots, *t.shape), dtype=t.dtype, device=device)
                for t in layer.tensors
            }
        staging.adopt(*self.slots.values())
        self._store = store
        where = addresses_of(store, layer.index, device)
        self._carrier = Carrier(store, layer.index, where, self.slots)
        blocks = staging.blocks(layer)
        self._through = [Carrier(store, layer.index, where, block) for block in blocks]
        self._forward = self._of_few = transformers_function(layer.module)
        if device.type == "cuda" and grouped_mm_waits(
            torch.cuda.get_device_capability(device), layer.tensors[0].dtype
        ):
            self._of_few = ALL_EXPERTS_FUNCTIONS["batched_mm"]
        self._stand_in = StandIn(layer.module, self.slots, self._num_slots)
        self._staged = [StandIn(layer.module, block, staging.experts) for block in blocks]
        self._dtype = self.slots["down_proj"].dtype
        self._list = (who.load_expert[layer.index], who.load_slot[layer.index])
        self._count = who.num_loads[layer.index : layer.index + 1]
        self._guard = Guard(device, layer.module, list(self.slots))
        self.watch = self._guard.watch
        self._number = operations.register(self)
        self.traced = False

    @property
    def residency(self) -> Residency:
        """Who is resident now, on the host; waits for the device."""
        return self._who.pull(self._index)

    @property
    def carriers(self) -> list[Carrier]:
        """What copies to the slots, and to the two staging blocks."""
        return [self._carrier, *self._through]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._num_slots * self.layer.block_bytes

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """
        Compute the layer's experts; see `melinoe.moe.dispatch.bind` for the shapes.

        Raises:
            AttachError: gradients are wanted; the model was moved or cast since `attach`; or a
                CUDA graph captures a pass that the host must plan.
        """
        if self.traced and torch.compiler.is_dynamo_compiling():
            return self._traced(hidden_states, top_k_index, top_k_weights)
        self._guard.check(hidden_states, top_k_weights)
        if not top_k_index.shape[0]:  # no token came this way: no pass, no request
            return torch.zeros_like(hidden_states)
        with self._passes.lock:
            self._passes.enter(self._index, top_k_index)
            with self._at_work():
                if self._passes.mode == DEVICE:
                    return self._on_device(hidden_states, top_k_index, top_k_weights)
                return self._with_host(hidden_states, top_k_index, top_k_weights)

    def plan(self, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        """
        Bring the chosen experts into their slots, for whoever computes them there.

        Returns:
            Slots, int64, and weights, both shaped as *top_k_index*.

        Raises:
            AttachError: as when called; or the host must plan this pass.
        """
        self._guard.check(top_k_weights, top_k_weights)
        self._passes.enter(self._index, top_k_index)
        if self._passes.mode != DEVICE:
            raise AttachError(
                f"a compiled step of {top_k_index.shape[0]} tokens may need more experts of a "
                "layer than it has slots; raise the slots, or leave compile out"
            )
        with self._at_work():
            return self._plan(top_k_index, top_k_weights)

    def read(self, expert: int) -> dict[str, Tensor]:
        """One expert as the store holds it, on the host."""
        return read_expert(self.layer, self._store, expert)

    def prefetch(self, experts: Sequence[int]) -> int:
        """Load *experts*, the most wanted first; returns how many loads that takes."""
        try:
            plan = self._who.pull(self._index).prefetch(experts)
            self._carrier.bring([(load.expert, load.slot) for load in plan.loads])
            self._who.push(self._index)
        except BaseException:
            self._who.reset()
            raise
        self._passes.prefetched(self._index, [load.expert for load in plan.loads])
        return len(plan.loads)

    def reset(self) -> None:
        """Forget who is resident; the counters stay."""
        self._who.pull(self._index).reset()
        self._who.push(self._index)

    # --- inner ----------------------------------------------------------------------------------

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Triton launches on the current device; what fails half-way leaves nothing to trust."""
        # With several GPUs the current one may be another.
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else None
        try:
            with on_device or nullcontext():
                yield
        except BaseException:
            if not _capturing(self._device):  # capturing runs nothing, so nothing is half done
                self._staging.arrive()  # a copy under way must not land on a later one
                self._who.reset()  # what was planned may not have been copied: trust no slot
            raise

    def _on_device(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        slots, weights = self._plan(top_k_index, top_k_weights)
        return self._product(slots)(self._stand_in, hidden, slots, weights)

    def _product(self, slots: Tensor) -> Callable[..., Tensor]:
        """The experts function for a step with these (token, choice) pairs."""
        return self._of_few if slots.numel() <= FEW_PAIRS else self._forward

    def _plan(self, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing here depends on what a tensor holds, so all of it can be captured."""
        # The kernel could not refuse: it would write beyond its lists.
        assert min(top_k_index.numel(), self._num_experts) <= self._num_slots
        planned = self._who.decide(self._index, top_k_index, top_k_weights)
        self._carrier.bring_listed(*self._list, self._count)
        if self._is_last:
            self._who.close_step(top_k_index.shape[0])
        return planned

    def _traced(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the compiler sees of a layer."""
        if self._dtype != torch.bfloat16:
            # Compiled, transformers' grouped_mm asks the host for all other types.
            return operations.experts(hidden, top_k_index, top_k_weights, self._number)
        slots, weights = operations.plan(top_k_index, top_k_weights, self._number)
        return self._product(slots)(self._stand_in, hidden, slots, weights)

    def _with_host(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if _capturing(self._device):
            raise AttachError(
                f"a CUDA graph is to hold a pass of {hidden.shape[0]} tokens, which may need more "
                "experts of a layer than it has slots; capture smaller passes, or raise the slots"
            )
        ids = top_k_index.reshape(-1).cpu().numpy()
        known = ids[(ids >= 0) & (ids < self._num_experts)]
        uses = np.bincount(known, minlength=self._num_experts)
        experts = uses.nonzero()[0]
        request = experts.tolist(), uses[experts].tolist()
        flat = top_k_index.reshape(-1).long()
        if known.size != ids.size:
            flat = torch.where((flat >= 0) & (flat < self._num_experts), flat, self._num_experts)
        pairs = Pairs(hidden, top_k_index.shape[1], self._dtype)
        residency = self._who.pull(self._index)
        if self._passes.mode == STREAM:
            self._stream(residency, *request, pairs, flat, uses)
        else:
            self._in_plans(residency, *request, pairs, flat)
        self._who.push(self._index)
        return pairs.total(top_k_weights)

    def _in_plans(
        self,
        residency: Residency,
        experts: list[int],
        uses: list[int],
        pairs: Pairs,
        flat: Tensor,
    ) -> None:
        """As the reference engine."""
        plans = []
        for plan in residency.request_in_parts(experts, uses):
            plans.append(plan)
            self._carrier.bring([(load.expert, load.slot) for load in plan.loads])
            present = [*plan.hits, *(load.expert for load in plan.loads)]
            due = np.full(self._num_experts + 1, -1)
            due[present] = residency.slot_of[present]
            pairs.add(self._forward, self._stand_in, self._to_device(due)[flat])
        self._passes.counters.add_decisions(self._index, experts, uses, plans)

    def _stream(
        self,
        residency: Residency,
        experts: list[int],
        uses: list[int],
        pairs: Pairs,
        flat: Tensor,
        uses_of: np.ndarray,
    ) -> None:
        """Residents first; meanwhile the others are copied, computed as they arrive."""
        rule = _KEEP if self._passes.paged else self._prefill()
        stream = rule.serve(residency, experts, uses)
        self._passes.counters.add_stream(self._index, experts, uses, stream)
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
                    (self._through[block] if staged else self._carrier).bring(members)
                self._staging.arrive()
            end = begin + int(sum(uses_of[expert] for expert, _ in members))
            stand_in = self._staged[block] if staged else self._stand_in
            pairs.add(self._forward, stand_in, slot_of_pair, order[begin:end])
            if staged:
                done[block] = self._staging.mark()
            begin = end

    def _to_device(self, table: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(table), self._device)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
