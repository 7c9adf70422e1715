"""
How many programs copy at once: tried on the device when an engine is attached.

What keeps a link busy differs from card to card. Too few programs have too little under way, and
too many may be in each other's way: a kernel that read an H100's host memory with all it had is
reported to reach two thirds of the copy engine's rate. Trying takes tens of milliseconds.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from melinoe.engine.device.carrier import Carrier
from melinoe.engine.device.copying import PROGRAMS_PER_SM, default_programs

_log = logging.getLogger("melinoe")

# Experts of one trial, and how often each is repeated; one more run is discarded.
_EXPERTS, _REPEATS = 8, 3
# What must be gained over the number that is usual.
_WORTH = 1.03


@dataclass(frozen=True)
class Trial:
    """One number of programs: how fast it copied, in bytes of the store a second."""

    programs: int
    bytes_per_s: float


def candidates(device: torch.device) -> list[int]:
    """Numbers of programs worth a trial, the usual one first."""
    usual = default_programs(device)
    if device.type != "cuda":
        return [usual]
    whole = usual // PROGRAMS_PER_SM
    others = [16, 32, 64, *(whole * times for times in (1, 2, 4, 8, 16))]
    return [usual, *(one for one in others if one != usual)]


def tune(
    carriers: Iterable[Sequence[Carrier]],
    device: torch.device,
    seconds: Callable[[Callable[[], None]], float] | None = None,
) -> dict[int, list[Trial]]:
    """
    Give each carrier's kernel the number of programs that copies fastest here.

    What the first carrier of a kind fills is overwritten; nobody may be resident there yet.

    Args:
        carriers: by layer, those that copy blocks of the layer, that to the slots first. Layers
            whose blocks are as long are tried once.
        device: where they copy to.
        seconds: times a launch; exchanged by tests.

    Returns:
        By bytes of a block, what was tried; nothing where there is nothing to choose from.
    """
    time = seconds or partial(_seconds, device)
    tried: dict[int, list[Trial]] = {}
    numbers = candidates(device)
    for group in carriers:
        plan, size = group[0].plan, group[0].plan.nbytes
        if size not in tried and len(numbers) > 1:
            experts = group[0].num_experts
            count = min(_EXPERTS, group[0].num_slots, experts)
            # Neighbours in memory are faster to read than what a step asks for.
            drawn = torch.randperm(experts, generator=torch.Generator().manual_seed(0))[:count]
            which = drawn.to(device, torch.int32)
            slots = torch.arange(count, dtype=torch.int32, device=device)
            loads = torch.tensor([count], dtype=torch.int32, device=device)
            tried[size] = []
            for number in numbers:
                plan.programs = number
                took = time(partial(plan.launch, which, slots, loads))
                tried[size].append(Trial(number, count * size / took))
            _log.info("copying blocks of %d bytes: %s", size, _said(tried[size]))
        for carrier in group:
            carrier.plan.programs = best(tried[size]) if size in tried else numbers[0]
    return tried


def best(trials: Sequence[Trial]) -> int:
    """The fastest number of programs; the first tried unless another is clearly faster."""
    usual, fastest = trials[0], max(trials, key=lambda one: one.bytes_per_s)
    return (fastest if fastest.bytes_per_s > _WORTH * usual.bytes_per_s else usual).programs


def _seconds(device: torch.device, launch: Callable[[], None]) -> float:
    """Median time on the device, the first run discarded."""
    times = []
    with torch.cuda.device(device):  # Triton launches on the current one
        for _ in range(_REPEATS + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])


def _said(trials: Sequence[Trial]) -> str:
    said = ", ".join(f"{one.programs} programs {one.bytes_per_s / 1e9:.1f}" for one in trials)
    return f"{said} GB/s; {best(trials)} are used"
