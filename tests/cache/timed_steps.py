"""Steps to time, and figures that make sums easy."""

import numpy as np

from melinoe.cache.counters import Counters
from melinoe.cache.simulator import Simulation, Steps
from melinoe.cache.timing import Work


def run(loads, experts, ahead=None, on_host=None, phase=None, tokens=None, unit=None, between=None):
    """A simulation of which only the steps matter; rows are passes, columns layers."""
    loads = np.array(loads, np.int32)
    zero = np.zeros_like(loads)
    steps = Steps(
        np.ones(len(loads), np.uint8) if phase is None else np.array(phase, np.uint8),
        np.ones(len(loads), np.int64) if tokens is None else np.array(tokens, np.int64),
        np.zeros(len(loads), np.int64) if unit is None else np.array(unit, np.int64),
        loads,
        np.array(experts, np.int32),
        zero if ahead is None else np.array(ahead, np.int32),
        zero if on_host is None else np.array(on_host, np.int32),
        np.zeros_like(loads) if on_host is None else np.array(on_host, np.int32),
        zero if between is None else np.array(between, np.int32),
    )
    layers = loads.shape[1]
    return Simulation(Counters(layers), [], [], (1,) * layers, "lru", steps=steps)


# A transfer takes 1 ms + 100 B / 10 kB/s = 11 ms; an expert is read in 1 ms, all else in 2 a layer.
SLOW = {"link_bytes_per_s": 1e4, "link_latency_s": 1e-3, "device_bytes_per_s": 1e5}

WORK = Work(expert_bytes=100, backbone_bytes=300, kv_bytes=100)
