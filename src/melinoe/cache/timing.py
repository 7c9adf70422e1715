"""
A time model: how long a simulated run would take on a machine of given figures.

It takes one forward pass after the other, as one user's decoding does. With

    B        bytes of one expert               L        MoE layers
    d        distinct experts of a request     n        loaded on demand
    e        missing, computed on the host     h        resident = d - n - e
    W, l     link: bytes/s, latency in s       D        device memory, bytes/s
    c        host seconds per copy             R        host memory (DRAM), bytes/s

one layer of one pass takes ``F + max(T, U) + C``: wait for the experts, then compute.

    x   = max(l + B / W, c)                       one transfer; they follow one another
    T   = n x
    U   = n c + e B / R + (p - e) s + 2 l + (t + p) a / W      (0 if e = 0)
                                                  p (token, choice) pairs of t tokens, s seconds
                                                  for each further row of an expert; activations of
                                                  a bytes go over, and come back by pairs
    C   = (h + n) B / D                           experts read through device memory
    F   = (backbone + KV) / (L D)                 all else

A pass takes the sum of its layers, and x before it for each expert that a prefetch brings: what
computing hides of that is left out. Where a pass with all experts resident was measured
(``pass_s``, and ``row_s`` for each row more), that replaces F + C. Stall is max(T, U): by the link
where T is longer, else by the host's computing. Whatever shares the machine is left out.

Source:
    Computing a miss where its weights are, on the host: Fiddler (arXiv:2402.07033), and llama.cpp's
    experts on the CPU. Splitting misses by measured bandwidths so that both sides end together:
    FreeToken 0.2. The rules are written down from those ideas; no code is theirs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np

from melinoe.cache import MISSES
from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.simulator import Simulation, Steps
from melinoe.errors import HardwareError

LoadRule = Callable[[Sequence[int]], int]
"""From the uses of each missing expert, ascending, to how many of them are loaded."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Figures of a machine and of the engine on it; HardwareError for what cannot be."""

    link_bytes_per_s: float  # host to device
    link_latency_s: float = 0.0  # of each transfer
    copy_s: float = 0.0  # host time of a copy that the link does not hide
    device_bytes_per_s: float | None = None  # None: computing is not modelled from bytes
    # The host computes missing experts from its memory, one row each, at this rate.
    dram_bytes_per_s: float | None = None
    host_row_s: float = 0.0  # of each further row of such an expert
    pass_s: float | None = None  # a pass of one row with all experts resident, measured
    row_s: float = 0.0  # each further row of a pass, measured

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Bytes that the model asks the machine to move; HardwareError for less than none."""

    expert_bytes: float  # of one, as it is carried
    activation_bytes: float = 0.0  # of one token between layers: to the host, and back by choice
    backbone_bytes: float = 0.0  # weights outside the experts that a pass reads
    kv_bytes: float = 0.0  # of the KV cache that a pass reads

    def __post_init__(self) -> None:
        _check(self)


def _check(figures: Machine | Work) -> None:
    for one in fields(figures):
        value = getattr(figures, one.name)
        positive = one.name.endswith("_per_s") or one.name == "expert_bytes"
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise HardwareError(
                f"{one.name} cannot be {value}; it must be a number "
                f"{'above 0' if positive else 'of 0 or more'}"
            )


# --- misses ---------------------------------------------------------------------------------------


def loads_when(miss: str, machine: Machine, work: Work) -> LoadRule | None:
    """
    Make the rule that `simulate` takes as ``load``, for a way to handle misses.

    ``wait``: all are loaded (None). ``cpu``: none is; the host computes them. ``split``: the host
    computes the least used, so many that the slower of both sides, ``max(k x, k c + U)``, is
    fastest; of equals the one that loads most. HardwareError if the host shall compute and its
    memory's bandwidth is not given.
    """
    if miss not in MISSES:
        raise ValueError(f"miss must be one of {', '.join(MISSES)}, got {miss!r}")
    if miss == "wait":
        return None
    if machine.dram_bytes_per_s is None:
        raise HardwareError(
            f"misses cannot be handled by {miss!r} without the host memory's bandwidth; give it"
        )
    if miss == "cpu":
        return lambda uses: 0
    each = transfer_s(machine, work)

    def split(uses: Sequence[int]) -> int:
        costs = [(len(uses) * each, -len(uses))]
        for on_host, pairs in enumerate(accumulate(uses), start=1):
            loads = len(uses) - on_host
            host = loads * machine.copy_s + computed_s(machine, work, on_host, pairs)
            costs.append((max(loads * each, host), -loads))
        return -min(costs)[1]

    return split


def transfer_s(machine: Machine, work: Work) -> float:
    """Seconds of one expert's transfer: x of the module's formulas."""
    carried = machine.link_latency_s + work.expert_bytes / machine.link_bytes_per_s
    return max(carried, machine.copy_s)


def computed_s(
    machine: Machine, work: Work, experts: int, pairs: int | None = None, rows: int | None = None
) -> float:
    """
    Seconds in which the host computes missing experts: U of the formulas, but for the copies.
    *pairs* of token and choice chose them, absent: one each; of so many *rows*, absent: spread
    evenly.
    """
    if not experts:
        return 0.0
    assert machine.dram_bytes_per_s is not None
    pairs = experts if pairs is None else pairs
    rows = -(-pairs // experts) if rows is None else min(rows, pairs)
    weights = experts * work.expert_bytes / machine.dram_bytes_per_s
    activations = (rows + pairs) * work.activation_bytes / machine.link_bytes_per_s
    further = (pairs - experts) * machine.host_row_s
    return weights + further + 2 * machine.link_latency_s + activations


# --- a whole run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Predicted seconds of each forward pass, float64 (passes,) each."""

    pass_s: np.ndarray  # all of it
    link_s: np.ndarray  # stalled for loads on demand
    host_s: np.ndarray  # stalled for the host that computes misses
    ahead_s: np.ndarray  # spent on prefetches
    steps: Steps  # what was timed
    transferred_bytes: float  # over the link, prefetches too

    def metrics(self) -> dict[str, float | None]:
        """The run by the names of reports, of the completion; ``ttft_s`` is the mean over units."""
        steps = self.steps
        chosen = steps.phase == COMPLETION
        tokens = int(steps.tokens[chosen].sum())
        prompts = np.bincount(steps.unit, weights=self.pass_s * (steps.phase == PROMPT))
        began = np.unique(steps.unit[steps.phase == PROMPT])

        def per_token(values: np.ndarray) -> float | None:
            return 1e3 * float(values[chosen].sum()) / tokens if tokens else None

        time_ms = per_token(self.pass_s)
        return {
            "ms_per_token": time_ms,
            "tokens_per_s": 1e3 / time_ms if time_ms else None,
            "stall_ms_per_token": per_token(self.link_s + self.host_s),
            "link_stall_ms_per_token": per_token(self.link_s),
            "cpu_stall_ms_per_token": per_token(self.host_s),
            "prefetch_ms_per_token": per_token(self.ahead_s),
            "ttft_s": float(prompts[began].mean()) if began.size else None,
        }


def predict(simulation: Simulation, machine: Machine, work: Work) -> Timing:
    """
    Time a simulation, made with ``steps=True``, by the module's formulas. HardwareError: the host
    computed misses, and its memory's bandwidth is not given; or computing can be predicted neither
    from a measured pass nor from bytes.
    """
    steps = simulation.steps
    if steps is None:
        raise ValueError("a time model needs what happened in each pass; simulate with steps=True")
    if machine.pass_s is None and machine.device_bytes_per_s is None:
        raise HardwareError(
            "how fast the model computes is not given; give the device memory's bandwidth, or the "
            "measured time of a pass with all experts resident"
        )
    if steps.on_host.any() and machine.dram_bytes_per_s is None:
        raise HardwareError("misses are computed on the host, so give its memory's bandwidth")
    passes, layers = steps.loads.shape
    if machine.pass_s is not None:
        computing = machine.pass_s + machine.row_s * (steps.tokens - 1)
    else:
        device = machine.device_bytes_per_s
        assert device is not None
        read = (steps.experts - steps.on_host).sum(axis=1) * work.expert_bytes
        computing = (read + work.backbone_bytes + work.kv_bytes) / device
    each = transfer_s(machine, work)
    link, host = steps.loads * each, np.zeros((passes, layers))
    for at in zip(*np.nonzero(steps.on_host), strict=True):
        pairs, rows = int(steps.on_host_uses[at]), int(steps.tokens[at[0]])
        host[at] = computed_s(machine, work, int(steps.on_host[at]), pairs, rows)
        host[at] += steps.loads[at] * machine.copy_s
    link_s = np.where(link >= host, link, 0).sum(axis=1)
    host_s = np.where(link >= host, 0, host).sum(axis=1)
    ahead_s = steps.ahead.sum(axis=1) * each
    copied = float(steps.loads.sum() + steps.ahead.sum())
    return Timing(
        computing + link_s + host_s + ahead_s, link_s, host_s, ahead_s, steps,
        copied * work.expert_bytes,
    )  # fmt: skip
