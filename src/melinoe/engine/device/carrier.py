"""Bring experts of one layer into slots or staging memory, whatever the store keeps them as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from melinoe.engine.device.blocks import segments
from melinoe.engine.device.copying import CopyPlan
from melinoe.engine.device.expanding import ExpandPlan
from melinoe.engine.device.residency import to_device
from melinoe.engine.store import Store
from melinoe.experts.integer import Integer
from melinoe.moe.experts import ExpertsLayer


class Carrier:
    """
    Copies experts of one layer into *targets*: a list that the device made, or one of the host's.

    Args:
        store: whose experts.
        layer: of which layer; its module's tensors are what the slots hold.
        where: `addresses` of the layer.
        targets: per name, a contiguous tensor ``(num_slots, ...)``.

    Attributes:
        plan: what launches the kernel.
        num_slots: of *targets*.
        num_experts: of the layer.
    """

    def __init__(
        self, store: Store, layer: ExpertsLayer, where: Tensor, targets: Mapping[str, Tensor]
    ) -> None:
        self._store, self._layer = store, layer.index
        self._device = where.device
        self.plan: CopyPlan | ExpandPlan
        parts, stored = segments(store, layer.index), store.format(layer.index)
        self._expands = isinstance(stored, Integer)
        if isinstance(stored, Integer):
            self.plan = ExpandPlan(where, parts, stored, layer.tensors, targets)
        else:
            self.plan = CopyPlan(where, parts, targets)
        self.num_experts = where.shape[0]
        self.num_slots = next(iter(targets.values())).shape[0]
        self._views = [{n: t[slot] for n, t in targets.items()} for slot in range(self.num_slots)]

    def bring_listed(self, experts: Tensor, slots: Tensor, count: Tensor) -> None:
        """Copy what a list on the device names; see `CopyPlan.launch`."""
        self.plan.launch(experts, slots, count)

    def bring(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy (expert, slot) pairs that the host names, in the order of the current stream."""
        if not pairs:
            return
        if self._expands:
            lists = [*zip(*pairs, strict=True), (len(pairs),) * len(pairs)]
            on_device = to_device(
                torch.tensor(lists, dtype=torch.int32, device="cpu"), self._device
            )
            self.plan.launch(on_device[0], on_device[1], on_device[2])
            return
        # Whole blocks whose addresses the host knows: the copy engine is faster than a kernel.
        for expert, slot in pairs:
            self._store.read(self._layer, expert, self._views[slot])
