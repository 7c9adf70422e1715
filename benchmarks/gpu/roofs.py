"""What the machine can do: the link by its copy engine and by kernel reads, and device memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from melinoe.fast import tuning
from melinoe.fast.blocks import device_address
from melinoe.fast.copying import CopyPlan, Segment


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Median time of *run* on the device, one discarded."""
    times = []
    for _ in range(repeats + 1):
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


def measure(device: torch.device, block_bytes: int, experts: int) -> dict[str, Any]:
    """
    Bytes per second, each way, of blocks of *block_bytes*, *experts* of them at once.

    Kernel reads are tried with the grids that the engine tries, and several chunks; the best is
    what it could have.
    """
    on_gpu = device.type == "cuda"
    host = torch.zeros(experts, block_bytes, dtype=torch.uint8)
    if on_gpu:
        host = host.pin_memory()
    first, second = (torch.zeros_like(host, device=device) for _ in range(2))
    size = host.numel()
    found: dict[str, Any] = {
        "copy_engine": size / seconds(lambda: first.copy_(host, non_blocking=True), device),
        "device": 2 * size / seconds(lambda: second.copy_(first), device),
    }
    begin = host.data_ptr()
    if on_gpu:
        begin = device_address(begin, device)
    addresses = torch.tensor([begin + e * block_bytes for e in range(experts)], device=device)
    lists = torch.arange(experts, dtype=torch.int32, device=device)
    count = torch.tensor([experts], dtype=torch.int32, device=device)
    segments = [Segment("block", 0, block_bytes)]
    tried = []
    chunks = (4096, 8192, 16384, 32768) if on_gpu else (4096,)
    for programs in tuning.candidates(device):
        for chunk in chunks:
            plan = CopyPlan(
                addresses, segments, {"block": first}, programs=programs, chunk_bytes=chunk
            )

            def run(plan: CopyPlan = plan) -> None:
                plan.launch(lists, lists, count)

            rate = size / seconds(run, device, 3)
            tried.append({"programs": programs, "chunk_bytes": chunk, "bytes_per_s": rate})
    assert torch.equal(first, host.to(device))
    best = max(tried, key=lambda one: one["bytes_per_s"])
    found |= {"kernel_reads": best["bytes_per_s"], "kernel_best": best, "kernel_tried": tried}
    return found
