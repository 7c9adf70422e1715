"""Load experts of one layer from host memory into slots or staging blocks, in whatever format."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from melinoe.engine.device.copying import CopyPlan, Segment
from melinoe.engine.device.expanding import ExpandPlan
from melinoe.engine.device.residency import to_device
from melinoe.errors import AttachError
from melinoe.experts.integer import Integer
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store


class Loader:
    """
    Loads experts of one layer into *targets*, as named by a list of the device or of the host.

    Args:
        store: holds the experts, in host memory.
        layer: the layer; slots hold the tensors of its module.
        where: `addresses` of the layer.
        targets: per name, a contiguous tensor ``(num_slots, ...)``.

    Attributes:
        plan: launches the kernel.
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

    def load_listed(self, experts: Tensor, slots: Tensor, count: Tensor) -> None:
        """Load the experts that a list on the device names; see `CopyPlan.launch`."""
        self.plan.launch(experts, slots, count)

    def load(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Load (expert, slot) pairs that the host names, in the order of the current stream."""
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


# --- where blocks lie ---------------------------------------------------------------------------


def _views_of(store: Store, layer: int, expert: int) -> dict[str, Tensor]:
    """View the parts of a block where they lie in host memory."""
    views = store.views(layer, expert)
    if views is None:
        raise AttachError(
            f"the GPU cannot read experts in a {store.kind} store; leave store out, or give "
            'engine="reference"'
        )
    return views


def segments(store: Store, layer: int) -> list[Segment]:
    """List the parts of a block of *layer*, in the order in which they lie there."""
    views = _views_of(store, layer, 0)
    first = min(view.data_ptr() for view in views.values())
    found = [Segment(n, v.data_ptr() - first, v.nbytes) for n, v in views.items()]
    return sorted(found, key=lambda segment: segment.offset)


def addresses(store: Store, layer: int, device: torch.device) -> Tensor:
    """
    Find where each block of *layer* begins, as *device* sees it: int64 ``(num_experts,)``.

    Raises:
        AttachError: a GPU cannot read the memory.
    """
    begins = [
        min(view.data_ptr() for view in _views_of(store, layer, expert).values())
        for expert in range(store.num_experts(layer))
    ]
    if device.type == "cuda":
        shift = device_address(begins[0], device) - begins[0]  # a layer is one allocation
        begins = [begin + shift for begin in begins]
    return torch.tensor(begins, dtype=torch.int64, device=device)


def device_address(host_address: int, device: torch.device) -> int:
    """
    Find the address by which a GPU reads page-locked host memory; usually the same.

    Raises:
        AttachError: the memory is not page-locked and mapped.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise AttachError(
            f"the CUDA driver's library cannot be opened ({error}), so the GPU cannot be told "
            'where experts lie in host memory; use engine="reference"'
        ) from error
    found = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the device's context the current one
        code = driver.cuMemHostGetDevicePointer_v2(
            ctypes.byref(found), ctypes.c_void_p(host_address), ctypes.c_uint(0)
        )
    if code != 0:
        raise AttachError(
            f"the GPU cannot read the experts' host memory in place (CUDA error {code}); give "
            'store="pinned", or engine="reference"'
        )
    return int(found.value)
