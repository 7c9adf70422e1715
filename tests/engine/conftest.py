"""A small trained-like model for the runtime's tests: 2 layers of 8 experts, top-2."""

from copy import deepcopy

import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def _original():
    return {
        dtype: tiny.tiny_model("olmoe", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.fixture
def model(_original):
    """Float32; each test its own, so that one that fails while attached spoils no other."""
    return deepcopy(_original[torch.float32])


@pytest.fixture
def bf16_model(_original):
    """Bfloat16; likewise."""
    return deepcopy(_original[torch.bfloat16])


class Clock:
    """Stand for the module `time`: sleeping moves it at once, and a look takes a microsecond."""

    now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Time as transfers and the host's experts see it, whatever else the machine does."""
    made = Clock()
    for module in ("transfer", "misses"):
        monkeypatch.setattr(f"melinoe.engine.{module}.time", made)
    return made
