"""Figures that a time model rests on: of the machine and its engine, and of the model's work."""

import math
from dataclasses import dataclass, fields

from melinoe.errors import HardwareError

OVERLAPS = ("none", "hits")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """
    Figures of the machine and of the engine that runs on it.

    Attributes:
        link_bytes_per_s: Host to device.
        link_latency_s: Of each transfer.
        copy_s: Host time of each copy that the link does not hide; the emulated link's real copy.
        device_bytes_per_s: Memory of the device; None: computing is not modelled from bytes.
        dram_bytes_per_s: At what rate the host computes missing experts from its memory, one row
            each, what a call of its own costs included.
        host_row_s: What each further row of such an expert takes.
        host_call_s: What it takes once for all experts of a request that it computes.
        host_threads: Threads that figure was measured with; the model does not depend on it.
        flops_per_s: Arithmetic of the device; None: never the bound.
        host_s_per_layer: Host work of each layer that nothing hides.
        host_s_per_pass: Of each pass.
        pass_s: Measured time of a pass of one row with all experts resident.
        row_s: Measured time of each further row of a pass.
        experts_share: Of the measured time, what the experts' computation takes; matters only
            where some of them are hidden or computed by the host.
        call_s: Of that, by layer, what does not depend on how many experts are computed.
        parts_s: What a request costs more for being computed in parts, and is then put together.
        part_s: What each part after the first costs more.
        after_wait_s: How much longer what follows a wait takes, for it finds caches and clock cold:
            pairs of seconds waited and seconds more, waits ascending; nothing more after no wait,
            between them in a straight line, beyond the last as after it.
        part_after_wait_s: The same for a part of a request that is computed in several, where what
            follows a wait is shorter; as ``after_wait_s`` where it is empty.
        overlap: ``none`` or ``hits``, see the module.

    Raises:
        HardwareError: a figure that no machine has.
    """

    link_bytes_per_s: float
    link_latency_s: float = 0.0
    copy_s: float = 0.0
    device_bytes_per_s: float | None = None
    dram_bytes_per_s: float | None = None
    host_row_s: float = 0.0
    host_call_s: float = 0.0
    host_threads: int | None = None
    flops_per_s: float | None = None
    host_s_per_layer: float = 0.0
    host_s_per_pass: float = 0.0
    pass_s: float | None = None
    row_s: float = 0.0
    experts_share: float = 0.0
    call_s: float = 0.0
    parts_s: float = 0.0
    part_s: float = 0.0
    after_wait_s: tuple[tuple[float, float], ...] = ()
    part_after_wait_s: tuple[tuple[float, float], ...] = ()
    overlap: str = "none"

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "overlap" or value is None:
                continue
            if one.name in ("after_wait_s", "part_after_wait_s"):
                _check_curve(one.name, value)
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

    def colder_s(self, waited_s: float, *, part: bool = False) -> float:
        """Seconds more that what follows a wait takes; it is all of a request, or a *part*."""
        before, slower = 0.0, 0.0
        for wait, more in (part and self.part_after_wait_s) or self.after_wait_s:
            if waited_s <= wait:
                share = (waited_s - before) / (wait - before) if wait > before else 1.0
                return slower + share * (more - slower)
            before, slower = wait, more
        return slower


def _check_curve(name: str, curve: tuple[tuple[float, float], ...]) -> None:
    waits = [waited for waited, _ in curve]
    finite = all(math.isfinite(value) and value >= 0 for pair in curve for value in pair)
    if waits != sorted(set(waits)) or not finite:
        raise HardwareError(f"{name} cannot be {curve}; give pairs of seconds, waits ascending")


@dataclass(frozen=True, kw_only=True)
class Work:
    """
    What the model asks of it.

    Attributes:
        expert_bytes: Of one expert, as it is carried.
        activation_bytes: Of one token between layers: what goes to the host for a missing expert
            that it computes, and comes back for each choice of one.
        backbone_bytes: Weights outside the experts that a pass reads.
        kv_bytes: Of the KV cache that a pass reads.
        flops_per_row: Arithmetic of one token through the whole model.

    Raises:
        HardwareError: no bytes, or less than none.
    """

    expert_bytes: float
    activation_bytes: float = 0.0
    backbone_bytes: float = 0.0
    kv_bytes: float = 0.0
    flops_per_row: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            least_is_open = one.name == "expert_bytes"
            if not math.isfinite(value) or value < 0 or (least_is_open and value == 0):
                raise HardwareError(f"{one.name} cannot be {value}; give the model's own figure")
