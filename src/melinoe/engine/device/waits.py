"""Learn from PyTorch whether a step makes the host wait for the device, before it is captured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# What torch.cuda.set_sync_debug_mode("warn") says of each call that waits.
_SAID = "called a synchronizing CUDA operation"


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """
    Collect which calls in the body make the host wait for *device*.

    Yields:
        A list, filled when the body has ended: ``file.py:line`` of each such call. Empty where the
        device is no GPU. PyTorch does not see every wait (``torch.cuda.synchronize`` is one that it
        leaves out), so a step of which nothing is told may still fail to be captured.
    """
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found += calls_that_wait(caught)


@contextmanager
def unwatched() -> Iterator[None]:
    """Leave calls in the body out of what `waits` collects."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    if not before:
        yield
        return
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def calls_that_wait(caught: list[warnings.WarningMessage]) -> list[str]:
    """Name the calls that waited; warnings about anything else are passed on."""
    found = []
    for one in caught:
        if _SAID in str(one.message):
            found.append(f"{Path(one.filename).name}:{one.lineno}")
        elif "synchronization debug mode" not in str(one.message).lower():
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return found
