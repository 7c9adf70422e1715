"""What the kernels must know of a store: at which addresses its blocks lie, and what is in them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from melinoe.engine.device.copying import Segment
from melinoe.engine.store import Store
from melinoe.errors import AttachError


def lying(store: Store, layer: int, expert: int) -> dict[str, Tensor]:
    """The parts of a block where they lie; the store is in host memory."""
    views = store.views(layer, expert)
    if views is None:
        raise ValueError(f"a kernel cannot read blocks of a store of kind {store.kind}")
    return views


def segments(store: Store, layer: int) -> list[Segment]:
    """The parts of a block of *layer*, in the order in which they lie there."""
    views = lying(store, layer, 0)
    first = min(view.data_ptr() for view in views.values())
    found = [Segment(n, v.data_ptr() - first, v.nbytes) for n, v in views.items()]
    return sorted(found, key=lambda segment: segment.offset)


def addresses(store: Store, layer: int, device: torch.device) -> Tensor:
    """
    Where each expert's block of *layer* begins, as *device* sees it: int64 ``(num_experts,)``.

    Raises:
        AttachError: a GPU cannot read the memory.
    """
    begins = [
        min(view.data_ptr() for view in lying(store, layer, expert).values())
        for expert in range(store.num_experts(layer))
    ]
    if device.type == "cuda":
        shift = device_address(begins[0], device) - begins[0]  # a layer is one allocation
        begins = [begin + shift for begin in begins]
    return torch.tensor(begins, dtype=torch.int64, device=device)


def device_address(host_address: int, device: torch.device) -> int:
    """
    The address by which a GPU reads page-locked host memory; usually the same.

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
