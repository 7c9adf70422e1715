"""
Choose how many programs copy experts at once, by a trial on the device when an engine is attached.

What keeps a link busy differs from card to card. Too few programs have too little under way, and
too many may be in each other's way: a kernel that read an H100's host memory with all it had is
reported to reach two thirds of the copy engine's rate. Trying takes tens of milliseconds.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from melinoe.engine.device.copying import PROGRAMS_PER_SM, default_programs
from melinoe.engine.device.loading import Loader

_log = logging.getLogger("melinoe")

# Experts of one trial, and how often each is repeated; one more run is discarded.
_EXPERTS, _REPEATS = 8, 3
# The gain over the usual number that makes another one worth it.
_WORTH = 1.03


def tune(
    loaders: Iterable[Sequence[Loader]],
    device: torch.device,
    seconds: Callable[[Callable[[], None]], float] | None = None,
) -> dict[int, dict[int, float]]:
    """
    Give each loader's kernel the number of programs that copies fastest here.

    The trial overwrites slots, so no expert may be resident yet.

    Args:
        loaders: by layer; the first of a layer, which copies to its slots, is tried. Layers whose
            blocks are equally long are tried once.
        device: where they copy to.
        seconds: times a launch; exchanged by tests.

    Returns:
        Bytes a second by bytes of a block and number of programs, the usual number first; empty
        where there is nothing to choose from.
    """
    time = seconds or partial(_seconds, device)
    rates: dict[int, dict[int, float]] = {}
    numbers = candidates(device)
    for group in loaders:
        plan, size = group[0].plan, group[0].plan.nbytes
        if size not in rates and len(numbers) > 1:
            experts = group[0].num_experts
            count = min(_EXPERTS, group[0].num_slots, experts)
            # Drawn, because neighbours in memory are faster to read than what a step asks for.
            drawn = torch.randperm(experts, generator=torch.Generator().manual_seed(0))[:count]
            which = drawn.to(device, torch.int32)
            slots = torch.arange(count, dtype=torch.int32, device=device)
            loads = torch.tensor([count], dtype=torch.int32, device=device)
            rates[size] = {}
            for number in numbers:
                plan.programs = number
                took = time(partial(plan.launch, which, slots, loads))
                rates[size][number] = count * size / took
            said = ", ".join(f"{n} programs {rate / 1e9:.1f}" for n, rate in rates[size].items())
            used = best(rates[size])
            _log.info("copying blocks of %d bytes: %s GB/s; %d are used", size, said, used)
        for loader in group:
            loader.plan.programs = best(rates[size]) if size in rates else numbers[0]
    return rates


def candidates(device: torch.device) -> list[int]:
    """List the numbers of programs worth a trial, the usual one first."""
    usual = default_programs(device)
    if device.type != "cuda":
        return [usual]
    whole = usual // PROGRAMS_PER_SM
    others = [16, 32, 64, *(whole * times for times in (1, 2, 4, 8, 16))]
    return [usual, *(one for one in others if one != usual)]


def best(rates: Mapping[int, float]) -> int:
    """Return the fastest number of programs; the first unless another is clearly faster."""
    usual, fastest = next(iter(rates)), max(rates, key=rates.__getitem__)
    return fastest if rates[fastest] > _WORTH * rates[usual] else usual


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
