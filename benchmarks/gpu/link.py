"""Measure the machine: the link from the store's own memory, and device memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from melinoe.engine.device.copying import PROGRAMS_PER_SM, Loader, addresses, default_programs

# Experts of one request: what a step of one token, a few tokens and a prompt may ask for.
COUNTS = (1, 2, 8, 32)
REPEATS = 5


def seconds(runs: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Median seconds of *runs* on the device, the first discarded."""
    times = []
    for run in runs:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin_s = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin_s)
    return statistics.median(times[1:])


def measure(store: Any, layers: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """
    Read random experts of the store by kernels and by the copy engine: bytes per second.

    Each repeat reads another layer's experts, drawn anew, so that neither neighbours in memory nor
    a cache helps. ``kernel_reads`` and ``copy_engine`` are the best rates at the most experts;
    ``device`` counts bytes read and written.
    """
    generator = torch.Generator().manual_seed(0)
    most = min(COUNTS[-1], layers[0].num_experts)
    slots = {
        p.name: torch.zeros((most, *p.shape), dtype=p.dtype, device=device)
        for p in store.format(0).parts(layers[0].tensors)
    }
    used = [layers[i % len(layers)] for i in range(REPEATS + 1)]
    loaders = [Loader(store, one.index, addresses(store, one.index, device), slots) for one in used]
    nbytes = loaders[0].nbytes
    tried = []
    for count in sorted({min(count, most) for count in COUNTS}):
        places = torch.arange(count, dtype=torch.int32, device=device)
        number = torch.tensor([count], dtype=torch.int32, device=device)
        drawn = [
            torch.randperm(one.num_experts, generator=generator)[:count].tolist() for one in used
        ]
        pairs = [list(zip(experts, range(count), strict=True)) for experts in drawn]
        engine = [partial(c.load, p) for c, p in zip(loaders, pairs, strict=True)]
        rate = count * nbytes / seconds(engine, device)
        tried.append({"by": "copy engine", "experts": count, "bytes_per_s": rate})
        lists = [torch.tensor(experts, dtype=torch.int32, device=device) for experts in drawn]
        kernels = [
            partial(c.load_listed, e, places, number) for c, e in zip(loaders, lists, strict=True)
        ]
        for programs in candidates(device):
            for loader in loaders:
                loader.programs = programs
            rate = count * nbytes / seconds(kernels, device)
            tried.append(
                {"by": "kernel", "experts": count, "programs": programs, "bytes_per_s": rate}
            )
    _check(store, used[-1].index, drawn[-1], slots)
    best = {
        by: max(one["bytes_per_s"] for one in tried if one["by"] == by and one["experts"] == most)
        for by in ("kernel", "copy engine")
    }
    source = torch.zeros(max(nbytes * most, 1 << 20), dtype=torch.uint8, device=device)
    copies = [partial(torch.zeros_like(source).copy_, source)] * (REPEATS + 1)
    return {
        "copy_engine": best["copy engine"],
        "kernel_reads": best["kernel"],
        "kernel_share": best["kernel"] / best["copy engine"],
        "device": 2 * source.numel() / seconds(copies, device),
        "tried": tried,
    }


def candidates(device: torch.device) -> list[int]:
    """
    List the numbers of programs worth a trial, the usual one first.

    Too few have too little under way, too many may be in each other's way: a kernel that read an
    H100's host memory with all it had is reported to reach two thirds of the copy engine's rate.
    """
    usual = default_programs(device)
    if device.type != "cuda":
        return [usual]
    whole = usual // PROGRAMS_PER_SM
    others = [16, 32, 64, *(whole * times for times in (1, 2, 4, 8, 16))]
    return [usual, *(one for one in others if one != usual)]


def _check(store: Any, layer: int, experts: Sequence[int], slots: dict[str, Any]) -> None:
    """The slots hold what the store holds."""
    for slot, expert in enumerate(experts):
        for name, view in store.views(layer, expert).items():
            assert torch.equal(slots[name][slot].cpu(), view), (layer, expert, name)
