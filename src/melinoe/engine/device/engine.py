"""Serve a model by an engine whose device decides, so that a decode step never asks the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from melinoe.cache.counters import Counters
from melinoe.cache.policy import Policy
from melinoe.cache.residency import StreamedPrefill
from melinoe.engine.device.copying import Staging
from melinoe.engine.device.decide import DeviceResidency
from melinoe.engine.device.experts import DeviceExperts
from melinoe.engine.device.graphs import DecodeGraphs
from melinoe.engine.device.passes import DevicePasses
from melinoe.engine.passes import watch_generate
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store


class DeviceEngine:
    """Let the device decide what is loaded; how long a step waits for it is not measured."""

    name = "fast"
    asks_host = False
    stall_s = host_s = 0.0
    graphs: DecodeGraphs

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertsLayer],
        store: Store,
        slots: Sequence[int],
        policies: Sequence[Callable[[], Policy]],
        device: torch.device,
        *,
        prefill: StreamedPrefill,
        staging_experts: int,
        use_graphs: bool,
    ) -> None:
        self.prefill: StreamedPrefill = prefill
        self.staging = Staging(device, staging_experts)
        self._store, self._device = store, device
        self._use_graphs = use_graphs
        # First: a policy or a model that cannot run here shows now.
        self.residencies = DeviceResidency(
            [layer.num_experts for layer in layers], list(slots), policies, device
        )
        self.passes = DevicePasses(
            model, Counters(len(layers)), self.residencies.fits, max(self.residencies.num_experts)
        )
        self.experts = [
            DeviceExperts(
                layer, self.residencies, store, self.staging, self.passes, prefill, device
            )
            for layer in layers
        ]

    @property
    def transferred_bytes(self) -> int:
        """Bytes copied from the store, for prompts, on demand and by prefetches; waits."""
        counters = self.counters()
        loads = counters.loads.sum(axis=0) + counters.prefetch_loads
        return sum(int(n) * self._store.block_bytes(layer) for layer, n in enumerate(loads))

    def plug_in(self, model: nn.Module) -> Callable[[], None]:
        """Let ``generate`` take captured steps; returns what undoes it."""
        self.graphs = DecodeGraphs(model, self.passes, self._device, self._use_graphs)
        with ExitStack() as undo:
            undo.callback(watch_generate(model, self.passes, may_compile=self._use_graphs))
            undo.callback(self.graphs.plug_in())
            return undo.pop_all().close

    def counters(self) -> Counters:
        """Read the counters; waits for the device."""
        return self.passes.counters.plus(self.residencies.counters())

    def reset_counters(self) -> None:
        """Count from zero."""
        self.passes.counters.reset()
        self.residencies.counts.zero_()

    @contextmanager
    def every_step_seen(self) -> Iterator[None]:
        """Replay no step in the body: the recorder sees all."""
        with self.graphs.paused():
            yield

    def finish(self) -> None:
        """Return when no copy is under way."""
        self.staging.finish()

    def close(self) -> None:
        """Free the captured steps, which hold the slots."""
        self.graphs.forget()
