"""What PyTorch's allocator takes for a tensor, and how much it may take in all."""

from __future__ import annotations

import torch

# Small tensors are packed together; large ones get whole pieces.
_SMALL, _PIECE = 1 << 20, 2 << 20


def pieces(nbytes: int) -> int:
    """Bytes that the allocator takes for a tensor of so many."""
    return -(-nbytes // _PIECE) * _PIECE if nbytes >= _SMALL else -(-nbytes // 512) * 512


class Cap:
    """
    A limit on what the allocator takes on *device*, in the whole process; without effect on a CPU.

    A request that would need more fails with `torch.OutOfMemoryError`, and the next one works. The
    allocator knows one limit a device: a second cap replaces the first.

    Args:
        total: bytes.
        device: where.
    """

    def __init__(self, total: int, device: torch.device) -> None:
        self._total, self._device = total, device
        self._before: float | None = None

    def put(self) -> None:
        """From now on."""
        if self._device.type == "cuda":
            memory = torch.cuda.get_device_properties(self._device).total_memory
            self._before = torch.cuda.get_per_process_memory_fraction(self._device)
            share = min(1.0, self._total / memory)
            torch.cuda.set_per_process_memory_fraction(share, self._device)

    def lift(self) -> None:
        """What was allowed before is allowed again; without effect if it was not put."""
        if self._before is not None:
            torch.cuda.set_per_process_memory_fraction(self._before, self._device)
            self._before = None
