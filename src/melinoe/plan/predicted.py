"""
What the simulator says a strategy will count and take, in the form of what `measure` measures.

Counts are the simulator's and must equal the measured ones. Time is `melinoe.cache.timing`'s, from
figures that were taken apart from the strategy: a pass with every expert resident, reading one
expert from the store alone, and the emulated link's own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.machine import Machine, Work
from melinoe.cache.prefetcher import Prefetcher
from melinoe.cache.simulator import Simulation, simulate
from melinoe.cache.timing import predict
from melinoe.cache.trace import Trace
from melinoe.plan.strategies import Strategy
from melinoe.runtime.handle import Handle

COUNTS = (
    "tokens",
    "uses",
    "hits",
    "loads",
    "prefetch_loads",
    "prefetch_used",
    "prefill_loads",
    "zero_miss",
)
_NO_LINK = 1e15  # bytes a second: a copy within host memory crosses no link


def replay(
    trace: Trace,
    strategy: Strategy,
    prefetch: Prefetcher | None,
    prompts: Sequence[Sequence[int]],
) -> Simulation:
    """
    Simulate one strategy on what the model chose.

    Args:
        trace: One sequence per prompt, in order.
        strategy: The strategy.
        prefetch: What it loads ahead, bound to the model.
        prompts: Token ids, as in the trace.
    """
    return simulate(
        trace,
        strategy.slots,
        strategy.policy,
        prefetch=prefetch,
        prompts=prompts,
        reset_between_sequences=not strategy.warm,
        steps=True,
        engine="residency",
    )


def counts_of(done: Simulation) -> dict[str, list[int]]:
    """The simulated counts by prompt, named as a measured record's ``per_prompt``."""
    columns: dict[str, list[int]] = {name: [] for name in COUNTS}
    for one in done.per_sequence:
        row = (
            one.tokens[COMPLETION],
            one.uses[COMPLETION].sum(),
            one.hits[COMPLETION].sum(),
            one.loads[COMPLETION].sum(),
            one.prefetch_loads.sum(),
            one.prefetch_used.sum(),
            one.loads[PROMPT].sum(),
            one.zero_miss_tokens[COMPLETION],
        )
        for name, value in zip(COUNTS, row, strict=True):
            columns[name].append(int(value))
    return columns


def seconds_of(done: Simulation, machine: Machine, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """
    Predicted seconds of each prompt: of its own pass, and of the passes after it.

    Args:
        done: Simulated with steps.
        machine: From `machine_of`.
        work: Bytes of an expert.
    """
    timing = predict(done, machine, work)
    steps = timing.steps
    out = []
    for phase in (PROMPT, COMPLETION):
        of_unit = np.zeros(len(done.sequences))
        chosen = steps.phase == phase
        np.add.at(of_unit, steps.unit[chosen], timing.pass_s[chosen])
        out.append(of_unit)
    return out[0], out[1]


def machine_of(handle: Handle, read_s: float, resident: Mapping[str, Any]) -> Machine:
    """
    The figures that predictions rest on, none of them from the strategies themselves.

    Args:
        handle: Any of the runtimes: they share link and store.
        read_s: From `time_load`.
        resident: ``per_prompt`` of the record with every expert resident: computing is what it
            took less what it waited.
    """
    rows = {name: np.array(values, dtype=float) for name, values in resident.items()}
    pass_s = (rows["decode_s"] - rows["stall_ms"] / 1e3).sum() / rows["tokens"].sum()
    prompt_s = (rows["ttft_s"] - rows["predictor_s"] - rows["prompt_stall_ms"] / 1e3).mean()
    more = max(rows["prompt_tokens"].mean() - 1, 1)
    link, size = handle.link, _expert_bytes(handle)
    if link is not None:
        speed, latency_s, copy_s = link.bandwidth_bytes_per_s, link.latency_s, read_s
    elif handle.store.kind == "pinned":
        speed, latency_s, copy_s = size / read_s, 0.0, 0.0
    else:
        speed, latency_s, copy_s = _NO_LINK, 0.0, read_s
    return Machine(
        link_bytes_per_s=speed,
        link_latency_s=latency_s,
        copy_s=copy_s,
        pass_s=float(pass_s),
        row_s=float(max(prompt_s - pass_s, 0) / more),
    )


def work_of(handle: Handle) -> Work:
    """Bytes of one expert, the mean over layers."""
    return Work(expert_bytes=_expert_bytes(handle))


def time_load(handle: Handle, device: torch.device, reads: int = 64, seed: int = 0) -> float:
    """Seconds of reading one expert from the store, alone: the median of *reads* random ones."""
    rng = np.random.default_rng(seed)
    into = [
        {t.name: torch.empty(t.shape, dtype=t.dtype, device=device) for t in layer.tensors}
        for layer in handle.layers
    ]
    taken = []
    for number in range(reads + 4):
        layer = int(rng.integers(len(handle.layers)))
        expert = int(rng.integers(handle.layers[layer].num_experts))
        begin = time.perf_counter()
        handle.store.read(layer, expert, into[layer])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 4:  # warm-up
            taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def _expert_bytes(handle: Handle) -> float:
    return float(np.mean([handle.store.block_bytes(n) for n in range(len(handle.layers))]))
