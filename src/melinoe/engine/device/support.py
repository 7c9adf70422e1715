"""Tell whether the device engine can run here, before anything is moved."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

# Ampere, which transformers' grouped_mm needs.
_CAPABILITY = (8, 0)
# Major compute capabilities (Hopper, data centre Blackwell) on which PyTorch multiplies groups
# without asking the host how large they are, in bfloat16 alone: pytorch#169970.
_GROUPS_ON_DEVICE = (9, 10)
_TRITON = (3, 6)


def why_not(device: torch.device) -> str | None:
    """
    Say why the device engine cannot run on *device*; None if it can. A CPU interprets, for tests.
    """
    try:
        found = version("triton")
        import triton
    except (ImportError, PackageNotFoundError):
        return "Triton is not installed"
    if tuple(int(part) for part in found.split(".")[:2]) < _TRITON:
        return f"Triton {found} is too old, it takes {'.'.join(map(str, _TRITON))} or newer"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and the model is on {device}"
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so that kernels would not run on the GPU; unset it"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, and "
            f"{_CAPABILITY[0]}.{_CAPABILITY[1]} is the least that works"
        )
    return None


def grouped_mm_waits(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Tell whether PyTorch's grouped product copies the groups' ends to the host, and waits."""
    return capability[0] not in _GROUPS_ON_DEVICE or dtype != torch.bfloat16
