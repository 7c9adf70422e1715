"""The fast engine at work on a model; used like any handle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from melinoe.cache.counters import Counters
from melinoe.cache.policy import Policy
from melinoe.cache.residency import StreamedPrefill
from melinoe.engine.budget import slots_by_layer
from melinoe.engine.device.budget import Cap, GpuBudget
from melinoe.engine.device.carrier import FastStore
from melinoe.engine.device.compiled import CompiledForward
from melinoe.engine.device.experts import FastExperts
from melinoe.engine.device.graphs import DecodeGraphs
from melinoe.engine.device.passes import FastPasses
from melinoe.engine.device.residency import DeviceResidency, to_counters
from melinoe.engine.device.staging import Staging
from melinoe.engine.device.tuning import tune
from melinoe.engine.generating import watch_generate
from melinoe.engine.handle import Handle
from melinoe.engine.passes import ForwardPasses
from melinoe.engine.record import Recorder
from melinoe.engine.usage import UseMeter
from melinoe.moe.experts import ExpertsLayer

_log = logging.getLogger("melinoe")


class FastHandle(Handle):
    """
    The fast engine at work on a model. Made by `attach` or `load` of `melinoe.engine.device`.

    As `Handle`, with these differences. Prompts are streamed by the rule `prefill`, which the
    simulator is told by ``simulate(..., prefill=handle.prefill)``. `counters` waits for the
    device; `latest_counters` does not. Time that a step waits for experts passes on the device and
    is not measured: `stall_s` is always 0.

    Attributes:
        prefill: the rule by which prompts are streamed; may be exchanged between two prompts.
        graphs: the captured decode steps.
        budget: of GPU memory, which is kept until `detach`; None if none was given.
        copies: how fast kernels copied experts when this was made, by bytes of a block and number
            of programs; see `melinoe.engine.device.tuning`. Empty without CUDA.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertsLayer],
        store: FastStore,
        slots: int | Sequence[int],
        policy: Callable[[], Policy] | Sequence[Callable[[], Policy]],
        device: torch.device,
        prefill: StreamedPrefill,
        staging_experts: int,
        use_graphs: bool,
        compile: bool = False,
        budget: GpuBudget | None = None,
        cap: Cap | None = None,
    ) -> None:
        self.prefill = prefill
        self._store = store
        self._device = device
        self._staging = Staging(device, staging_experts)
        self._use_graphs = use_graphs
        self._compile = compile
        self.budget, self._cap = budget, cap
        self._warned_of_uses = False
        # Before anything is moved: a policy or a model that cannot run here shows now.
        self._residencies = DeviceResidency(
            [layer.num_experts for layer in layers],
            slots_by_layer(slots, layers),
            [policy] * len(layers) if callable(policy) else policy,
            device,
        )
        self._seen: tuple[torch.Tensor, Any] | None = None
        self._latest = self._residencies.counts.cpu().numpy()
        super().__init__(model, layers, store, slots, policy, None, device)

    # --- what another engine does otherwise -----------------------------------------------------

    def _follow(self, model: nn.Module) -> ForwardPasses:
        most = max(self._residencies.num_experts)
        return FastPasses(model, self._counters, self._residencies.fits, most)

    def _make_caches(
        self, policy: Callable[[], Policy] | Sequence[Callable[[], Policy]], device: torch.device
    ) -> list[Any]:
        assert isinstance(self._passes, FastPasses)
        made = [
            FastExperts(
                layer, self._residencies, self._store, self._staging, self._passes, self._rule,
                device,
            )
            for layer in self.layers
        ]  # fmt: skip
        self.copies = tune((one.carriers for one in made), device)
        return made

    def _rule(self) -> StreamedPrefill:
        return self.prefill

    def _plug_in(self, model: nn.Module) -> Callable[[], None]:
        assert isinstance(self._passes, FastPasses)
        compiled = None
        if self._compile:
            compiled = CompiledForward(model, self._caches, self._passes)
            _log.info(
                "decode steps are compiled: fused kernels round otherwise than the model's own, so "
                "the last bits of logits change"
            )
        self.graphs = DecodeGraphs(model, self._passes, self._device, self._use_graphs, compiled)
        with ExitStack() as undo:
            undo.callback(watch_generate(model, self._passes, may_compile=self._use_graphs))
            undo.callback(self.graphs.plug_in())
            return undo.pop_all().close

    # --- reading --------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What was counted since the start or `reset_counters`; waits for the device."""
        return self._counters.plus(to_counters(self._residencies.counts.cpu().numpy()))

    @property
    def latest_counters(self) -> Counters:
        """
        What the device had counted when its last reading arrived; waits for nothing.

        Each call takes in a reading that has arrived and begins the next one, so it lags behind by
        one call. Forward passes under way are in it in part.
        """
        if self._device.type != "cuda":
            return self.counters
        if self._seen is not None and self._seen[1].query():
            self._latest = self._seen[0].numpy().copy()
            self._seen = None
        if self._seen is None:
            buffer = torch.empty(self._residencies.counts.shape, dtype=torch.int64, pin_memory=True)
            buffer.copy_(self._residencies.counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
            self._seen = (buffer, event)
        return self._counters.plus(to_counters(self._latest))

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self._device

    @property
    def fallbacks(self) -> int:
        """Decode steps that the host planned, because they might have needed more slots."""
        assert isinstance(self._passes, FastPasses)
        return self._passes.fallbacks

    @property
    def stall_s(self) -> float:
        """Always 0: the wait for experts is part of the step on the device."""
        return 0.0

    @property
    def transferred_bytes(self) -> int:
        """Bytes copied from the store, for prompts, on demand and by prefetches; waits."""
        counters = self.counters
        loads = counters.loads.sum(axis=0) + counters.prefetch_loads
        return sum(int(n) * self.store.block_bytes(layer) for layer, n in enumerate(loads))

    @property
    def staging_bytes(self) -> int:
        """Bytes of the memory that prompts' experts pass through."""
        return self._staging.nbytes

    # --- acting ---------------------------------------------------------------------------------

    def reset_counters(self) -> None:
        """As `Handle.reset_counters`."""
        with self.lock:
            super().reset_counters()
            self._residencies.counts.zero_()
            self._seen, self._latest = None, np.zeros_like(self._latest)

    def audit(self) -> int:
        """Compare books and slots as `Handle.audit` does; waits for the device."""
        with self.lock:
            self._staging.finish()
            return super().audit()

    def _forget_prefetches(self, but: Sequence[Collection[int]]) -> None:
        self._residencies.forget_prefetches(but)

    @contextmanager
    def record(
        self, model_name: str = "", scores: bool = False, guesses: bool = False
    ) -> Iterator[Recorder]:
        """As `Handle.record`; steps are not replayed from graphs meanwhile, so that all show."""
        with self.graphs.paused(), super().record(model_name, scores, guesses) as recorder:
            yield recorder

    @contextmanager
    def measure_uses(self) -> Iterator[UseMeter]:
        """As `Handle.measure_uses`; no step is replayed from a graph meanwhile, which is logged."""
        if self._use_graphs and not self._warned_of_uses:
            self._warned_of_uses = True
            _log.warning(
                "counting which experts are used runs decode steps without CUDA graphs, which is "
                "slower; leave the prior out, or let it learn on the reference engine"
            )
        with self.graphs.paused(), super().measure_uses() as meter:
            yield meter

    def detach(self) -> None:
        """As `Handle.detach`; weights that were stored as codes come back as what those mean."""
        with self.lock:
            if self._attached and not self._passes.inside:
                self._staging.finish()
                self.graphs.forget()
                if self._cap is not None:
                    self._cap.lift()  # experts that come back may need more
            super().detach()
