"""
Choose how many programs copy experts at once, by a trial on the device when an engine is attached.

What keeps a link busy differs from card to card. Too few programs have too little under way, and
too many may be in each other's way: a kernel that read an H100's host memory with all it had is
reported to reach two thirds of the copy engine's rate. Trying takes tens of milliseconds.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from melinoe.engine.device.carrier import Carrier
from melinoe.engine.device.copying import PROGRAMS_PER_SM, default_programs

_log = logging.getLogger("melinoe")

# Experts of one trial, and how often each is repeated; one more run is discarded.
_EXPERTS, _REPEATS = 8, 3
# What must be gained over the usual number.
_WORTH = 1.03


class Trial(NamedTuple):
    """One number of programs, and the bytes of the store that it copied a second."""

    programs: int
    bytes_per_s: float


def candidates(device: torch.device) -> list[int]:
    """List the numbers of programs worth a trial, the usual one first."""
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

    The trial overwrites slots, so no expert may be resident yet.

    Args:
        carriers: by layer; the first of a layer, which copies to its slots, is tried. Layers whose
            blocks are equally long are tried once.
        device: where they copy to.
        seconds: times a launch; exchanged by tests.

    Returns:
        The trials, by bytes of a block; empty where there is nothing to choose from.
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
            rates = ", ".join(f"{n} programs {rate / 1e9:.1f}" for n, rate in tried[size])
            _log.info(
                "copying blocks of %d bytes: %s GB/s; %d are used", size, rates, best(tried[size])
            )
        for carrier in group:
            carrier.plan.programs = best(tried[size]) if size in tried else numbers[0]
    return tried


def best(trials: Sequence[Trial]) -> int:
    """The fastest number of programs; the first tried unless another is clearly faster."""
    usual, fastest = trials[0], max(trials, key=lambda one: one.bytes_per_s)
    return (fastest if fastest.bytes_per_s > _WORTH * usual.bytes_per_s else usual).programs


def _seconds(device: torch.device, launch: Callable[[], None]) -> float:
    """Measure the median time on the device, the first run discarded."""
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
