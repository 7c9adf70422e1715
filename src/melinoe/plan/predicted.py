"""
Predict the counts and seconds of a strategy by simulation, in the form that `measure` measures.

Counts are the simulator's and must equal the measured ones. Time is `melinoe.cache.timing`'s, from
figures that were measured apart from the strategy: a pass with every expert resident, reading one
expert from the store alone, and the emulated link's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.prefetch import Prefetcher
from melinoe.cache.simulator import Simulation, simulate
from melinoe.cache.timing import Machine, Work, predict
from melinoe.cache.trace import Trace
from melinoe.engine.handle import Handle
from melinoe.engine.misses import activation_bytes, link_figures, mean_block_bytes
from melinoe.plan.strategies import Strategy

COUNTS = (
    "tokens",
    "uses",
    "hits",
    "loads",
    "prefetch_loads",
    "prefetch_used",
    "prefill_loads",
    "elsewhere",
    "prefill_elsewhere",
    "zero_miss",
)


def replay(
    trace: Trace,
    strategy: Strategy,
    prefetch: Prefetcher | None,
    prompts: Sequence[Sequence[int]],
    handle: Handle | None = None,
) -> Simulation:
    """
    Simulate one strategy on what the model chose.

    Args:
        trace: One sequence per prompt, in order.
        strategy: The strategy.
        prefetch: What it loads ahead, bound to the model.
        prompts: Token ids, as in the trace.
        handle: The strategy's runtime: its rule for misses, and for prompts that are streamed.
    """
    return simulate(
        trace,
        strategy.slots,
        strategy.policy,
        prefetch=prefetch,
        prompts=prompts,
        reset_between_sequences=not strategy.warm,
        load=None if handle is None else handle.misses.rule,
        prefill=getattr(handle, "prefill", None),
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
            one.on_host[COMPLETION].sum(),
            one.on_host[PROMPT].sum(),
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
        read_s: From `melinoe.engine.misses.time_read`.
        resident: ``per_prompt`` of the record with every expert resident: computing is what it
            took less what it waited.
    """
    rows = {name: np.array(values, dtype=float) for name, values in resident.items()}
    pass_s = (rows["decode_s"] - rows["stall_ms"] / 1e3).sum() / rows["tokens"].sum()
    prompt_s = (rows["ttft_s"] - rows["predictor_s"] - rows["prompt_stall_ms"] / 1e3).mean()
    more = max(rows["prompt_tokens"].mean() - 1, 1)
    found = replace(
        link_figures(handle.store, handle.link, read_s),
        pass_s=float(pass_s),
        row_s=float(max(prompt_s - pass_s, 0) / more),
    )
    costs = handle.misses.machine
    if costs is not None:
        found = replace(found, dram_bytes_per_s=costs.dram_bytes_per_s, host_row_s=costs.host_row_s)
    return found


def work_of(handle: Handle) -> Work:
    """Bytes of one expert, the mean over layers, and of a token on its way to the host."""
    return Work(
        expert_bytes=mean_block_bytes(handle.store),
        activation_bytes=activation_bytes(handle.layers[0]),
    )
