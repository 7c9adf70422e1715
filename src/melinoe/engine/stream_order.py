"""Order the calls of one model that are made on several CUDA streams."""

from __future__ import annotations

from typing import Any

import torch


class StreamOrder:
    """
    Let each call begin on the device after the call before it, whatever streams they are made on.

    Calls share slots: without this a call on a second stream would load an expert into a slot that
    the first stream still computes with.

    Args:
        device: where the slots are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None

    def follow(self) -> None:
        """Before a call: its stream waits for that of the call before; the host does not."""
        if self._device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        now = torch.cuda.current_stream(self._device)
        if self._last is not None and now != self._last:
            now.wait_stream(self._last)
        self._last = now
