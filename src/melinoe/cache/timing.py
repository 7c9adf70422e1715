"""
A time model: how long a simulated run would take on a machine of given figures.

Written for one forward pass after the other, as one user's decoding is. With

    B        bytes of one expert               L        MoE layers
    d        distinct experts of a request     n        loaded on demand
    e        missing, computed on the host     h        resident = d - n - e
    W, l     link: bytes/s, latency in s       D        device memory, bytes/s
    c        host seconds per copy             R        host memory (DRAM), bytes/s

one layer of one pass takes

    x   = max(l + B / W, c)                       one transfer; they follow one another
    T   = q + n x                                 q: the link is still busy with a prefetch
    U   = e B / R + 2 l        (0 if e = 0)       activations go over and come back
    H   = h B / D,  N = n B / D                   experts read through device memory
    F   = f + (backbone + KV) / (L D)             all else, f host seconds per layer
    w   = what is left until this layer's prefetch has arrived, if it is used

    overlap none:   F + w + max(T, U) + H + N     wait, then compute
    overlap hits:   F + w + max(T, U, H) + N      hits are computed while misses come

and a pass its layers' sum plus the host's seconds per pass. Where a pass with all experts resident
was measured (``pass_s``, and ``row_s`` for each row more), that replaces F + H + N, of which
``experts_share`` is H + N, by d experts alike. A pass of many rows is bound by arithmetic sooner
than by memory, so for prompts `Machine.flops_per_s` bounds it from below where it is known.

Prefetches of all layers are issued one after the other right before their pass: the host spends c
on each, and the link carries them while layers compute. They delay later loads on demand (q).

Stall is what the layers take beyond F + H + N: by the link (w, or T where it is longest) or by the
host's computing (U). Nothing is said about what shares the machine.

Source:
    The limits of docs/method.md, taken apart by layer. Copies on one link follow one another and
    take ``latency + bytes / bandwidth``, as `melinoe.runtime.transfer.EmulatedLink` has it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.simulation import Simulation, Steps
from melinoe.errors import HardwareError

OVERLAPS = ("none", "hits")
MISSES = ("wait", "cpu", "split")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """
    Figures of the machine and of the engine that runs on it.

    Attributes:
        link_bytes_per_s: Host to device.
        link_latency_s: Of each transfer.
        copy_s: Host time of each copy that the link does not hide; the emulated link's real copy.
        device_bytes_per_s: Memory of the device; None: computing is not modelled from bytes.
        dram_bytes_per_s: Host memory, for misses that the host computes.
        flops_per_s: Arithmetic of the device; None: never the bound.
        host_s_per_layer: Host work of each layer that nothing hides.
        host_s_per_pass: Of each pass.
        pass_s: Measured time of a pass of one row with all experts resident.
        row_s: Measured time of each further row of a pass.
        experts_share: Of the measured time, what the experts' computation takes; matters only
            where some of them are hidden or computed by the host.
        overlap: ``none`` or ``hits``, see the module.

    Raises:
        HardwareError: a figure that no machine has.
    """

    link_bytes_per_s: float
    link_latency_s: float = 0.0
    copy_s: float = 0.0
    device_bytes_per_s: float | None = None
    dram_bytes_per_s: float | None = None
    flops_per_s: float | None = None
    host_s_per_layer: float = 0.0
    host_s_per_pass: float = 0.0
    pass_s: float | None = None
    row_s: float = 0.0
    experts_share: float = 0.0
    overlap: str = "none"

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "overlap" or value is None:
                continue
            positive = one.name.endswith("_per_s")
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise HardwareError(
                    f"{one.name} cannot be {value}; it must be a number "
                    f"{'above 0' if positive else 'of 0 or more'}"
                )
        if self.experts_share > 1:
            raise HardwareError(f"experts_share cannot be {self.experts_share}; it is at most 1")
        if self.overlap not in OVERLAPS:
            raise HardwareError(
                f"overlap cannot be {self.overlap!r}; choose one of {', '.join(OVERLAPS)}"
            )


@dataclass(frozen=True, kw_only=True)
class Work:
    """
    What the model asks of it.

    Attributes:
        expert_bytes: Of one expert, as it is carried.
        backbone_bytes: Weights outside the experts that a pass reads.
        kv_bytes: Of the KV cache that a pass reads.
        flops_per_row: Arithmetic of one token through the whole model.

    Raises:
        HardwareError: no bytes, or less than none.
    """

    expert_bytes: float
    backbone_bytes: float = 0.0
    kv_bytes: float = 0.0
    flops_per_row: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            least_is_open = one.name == "expert_bytes"
            if not math.isfinite(value) or value < 0 or (least_is_open and value == 0):
                raise HardwareError(f"{one.name} cannot be {value}; give the model's own figure")


@dataclass(frozen=True)
class Timing:
    """
    Predicted seconds of each forward pass, float64 (passes,) each.

    Attributes:
        pass_s: All of it.
        link_s: Stalled for the link: loads on demand, and prefetches that came too late.
        host_s: Stalled for the host that computes misses.
        ahead_s: Spent on issuing prefetches.
        steps: What was timed.
        transferred_bytes: Over the link, prefetches too.
    """

    pass_s: np.ndarray
    link_s: np.ndarray
    host_s: np.ndarray
    ahead_s: np.ndarray
    steps: Steps
    transferred_bytes: float

    def metrics(self) -> dict[str, float | None]:
        """
        The run by the names of reports; of the completion's tokens unless the name says else.

        ``ttft_s`` is the mean over units of the time until the prompt's last pass has ended, with
        what is issued in it; None where there is no prompt, and the others where no completion.
        """
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


def loads_when(miss: str, machine: Machine, work: Work) -> Callable[[int], int] | None:
    """
    What `simulate` is told as ``load``, for a way to handle misses.

    ``wait``: all are loaded (None). ``cpu``: none is; the host computes them. ``split``: of n
    missing, as many are loaded as makes the slower of both sides fastest, ``max(k x, U(n - k))``;
    of equally fast splits the one that loads most, since a load may be used again.

    Raises:
        HardwareError: the host shall compute, and its memory's bandwidth is not given.
        ValueError: an unknown way.
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
        return lambda missing: 0
    each = transfer_s(machine, work)

    def split(missing: int) -> int:
        costs = [
            (max(k * each, computed_s(machine, work, missing - k)), -k) for k in range(missing + 1)
        ]
        return -min(costs)[1]

    return split


def transfer_s(machine: Machine, work: Work) -> float:
    """Seconds of one expert's transfer: x of the module's formulas."""
    carried = machine.link_latency_s + work.expert_bytes / machine.link_bytes_per_s
    return max(carried, machine.copy_s)


def computed_s(machine: Machine, work: Work, experts: int) -> float:
    """Seconds in which the host computes *experts*: U of the module's formulas."""
    if not experts:
        return 0.0
    assert machine.dram_bytes_per_s is not None
    return experts * work.expert_bytes / machine.dram_bytes_per_s + 2 * machine.link_latency_s


def predict(simulation: Simulation, machine: Machine, work: Work) -> Timing:
    """
    Time a simulation by the module's formulas.

    Args:
        simulation: Made with ``steps=True``, and with `loads_when` for misses that do not wait.
        machine, work: Figures.

    Raises:
        ValueError: the simulation kept no steps.
        HardwareError: the host computed misses, and its memory's bandwidth is not given; or
            computing can be predicted neither from a measured pass nor from bytes.
    """
    steps = simulation.steps
    if steps is None:
        raise ValueError("a time model needs what happened in each pass; simulate with steps=True")
    if machine.pass_s is None and machine.device_bytes_per_s is None:
        raise HardwareError(
            "how fast the model computes is not given; give the device memory's bandwidth, or the "
            "measured time of a pass with all experts resident"
        )
    if steps.elsewhere.any() and machine.dram_bytes_per_s is None:
        raise HardwareError("misses are computed on the host, so give its memory's bandwidth")
    passes, layers = steps.loads.shape
    other, resident, fresh = _computing(steps, machine, work)
    each, carried = transfer_s(machine, work), work.expert_bytes / machine.link_bytes_per_s
    carried += machine.link_latency_s
    pass_s, link_s, host_s, ahead_s = (np.zeros(passes) for _ in range(4))
    arrives = np.zeros(layers)  # when each layer's last prefetch has arrived
    now = free = 0.0  # the clock, and when the link will be free
    loads, experts = steps.loads.tolist(), steps.experts.tolist()
    ahead, elsewhere = steps.ahead.tolist(), steps.elsewhere.tolist()
    for step in range(passes):
        begin = now
        now += machine.host_s_per_pass
        for layer, count in enumerate(ahead[step]):
            for _ in range(count):
                free = max(free, now) + carried
                now += machine.copy_s
            if count:
                arrives[layer] = free
        ahead_s[step] = now - begin - machine.host_s_per_pass
        for layer in range(layers):
            count, host = loads[step][layer], elsewhere[step][layer]
            now += other[step][layer]
            late = 0.0
            if arrives[layer] and experts[step][layer] > count + host:
                late = max(0.0, arrives[layer] - now)
                arrives[layer] = 0.0
                now += late
            link = 0.0
            if count:
                link = max(0.0, free - now) + count * each
                free = now + link
            cpu = computed_s(machine, work, host)
            longest = max(link, cpu)
            hidden = min(longest, resident[step][layer]) if machine.overlap == "hits" else 0.0
            now += longest - hidden + resident[step][layer] + fresh[step][layer]
            link_s[step] += late
            if link >= cpu:
                link_s[step] += longest - hidden
            else:
                host_s[step] += longest - hidden
        pass_s[step] = now - begin
    carried_bytes = float(steps.loads.sum() + steps.ahead.sum()) * work.expert_bytes
    return Timing(pass_s, link_s, host_s, ahead_s, steps, carried_bytes)


def _computing(
    steps: Steps, machine: Machine, work: Work
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """F, H and N by pass and layer; a measured pass is shared out evenly over its layers."""
    passes, layers = steps.loads.shape
    other = np.full((passes, layers), machine.host_s_per_layer)
    here = (steps.experts - steps.loads - steps.elsewhere).astype(float)
    if machine.pass_s is not None:
        of_layer = (machine.pass_s + machine.row_s * (steps.tokens - 1))[:, None] / layers
        per_expert = machine.experts_share * of_layer / np.maximum(steps.experts, 1)
        other += (1 - machine.experts_share) * of_layer
        return other.tolist(), (per_expert * here).tolist(), (per_expert * steps.loads).tolist()
    assert machine.device_bytes_per_s is not None
    other += (work.backbone_bytes + work.kv_bytes) / (layers * machine.device_bytes_per_s)
    resident = here * work.expert_bytes / machine.device_bytes_per_s
    fresh = steps.loads * work.expert_bytes / machine.device_bytes_per_s
    if machine.flops_per_s is not None and work.flops_per_row:
        # Where arithmetic takes longer than memory, all of a pass is stretched to it.
        least = steps.tokens * work.flops_per_row / machine.flops_per_s
        total = (other + resident + fresh).sum(axis=1)
        stretch = np.maximum(1.0, least / np.maximum(total, 1e-30))[:, None]
        other, resident, fresh = other * stretch, resident * stretch, fresh * stretch
    return other.tolist(), resident.tolist(), fresh.tolist()
