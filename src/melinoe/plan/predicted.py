"""
What the simulator says a strategy will count and take, in the form of what `measure` measures.

Counts are the simulator's and must equal the measured ones. Time is put together from three things
timed apart from the strategy: computing, from the run with every expert resident; reading one
expert from the store, timed alone; and the link's own figures.

    a request's loads take   max(n x read, n x link, (n - 1) x read + link)
    a token takes            computing + what its layers' requests wait for

A prefetch before the completion is read at once and crosses the link while computing goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.simulator import Simulation, simulate
from melinoe.cache.trace import Trace
from melinoe.plan.strategies import Strategy
from melinoe.runtime.handle import Handle

COUNTS = ("tokens", "uses", "hits", "loads", "prefetch_loads", "prefill_loads", "zero_miss")


@dataclass(frozen=True)
class LoadCost:
    """
    Seconds of one load.

    Attributes:
        read_s: From the store into a slot.
        link_s: On the emulated link; 0 without one.
    """

    read_s: float
    link_s: float = 0.0

    def wait(self, loads: np.ndarray) -> np.ndarray:
        """Seconds that requests of so many loads wait for them; issued in turn, then awaited."""
        last = np.maximum(loads - 1, 0) * self.read_s + self.link_s
        return np.where(
            loads > 0, np.maximum(np.maximum(loads * self.read_s, loads * self.link_s), last), 0.0
        )


def replay(
    trace: Trace,
    strategy: Strategy,
    ahead: Sequence[Sequence[Sequence[int]]] | None,
    prefetch_at: str,
) -> Simulation:
    """
    Simulate one strategy on what the model chose.

    Args:
        trace: One sequence per prompt, in order.
        strategy: The strategy.
        ahead: Per prompt and layer the experts to prefetch, most wanted first; None for none.
        prefetch_at: As in `melinoe.generate.generate`.
    """
    return simulate(
        trace,
        strategy.slots,
        strategy.policy,
        prefetch=None if ahead is None else dict(enumerate(ahead)),
        prefetch_at=prefetch_at,
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
            one.loads[PROMPT].sum(),
            one.zero_miss_tokens[COMPLETION],
        )
        for name, value in zip(COUNTS, row, strict=True):
            columns[name].append(int(value))
    return columns


def stalls_of(done: Simulation, cost: LoadCost, pass_s: float) -> tuple[np.ndarray, np.ndarray]:
    """
    Seconds each prompt waits for experts: in the prompt's own pass, and after it.

    Args:
        done: Simulated with steps.
        cost: Of a load.
        pass_s: Computing of one token, behind which a prefetch's transfers hide.
    """
    steps = done.steps
    assert steps is not None  # asked for by `replay`
    waits = cost.wait(steps.loads).sum(axis=1)
    ahead = steps.ahead.sum(axis=1)
    hidden = np.minimum(ahead * max(cost.link_s - cost.read_s, 0), pass_s)
    waits = waits + ahead * max(cost.link_s, cost.read_s) - hidden
    of_prompt, after = (np.zeros(len(done.sequences)) for _ in range(2))
    np.add.at(of_prompt, steps.unit[steps.phase == PROMPT], waits[steps.phase == PROMPT])
    np.add.at(after, steps.unit[steps.phase == COMPLETION], waits[steps.phase == COMPLETION])
    return of_prompt, after


def time_load(handle: Handle, device: torch.device, reads: int = 64, seed: int = 0) -> LoadCost:
    """
    Time the store alone: random experts into a slot of their own, the median of *reads*.

    The link's part is by its figures.
    """
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
    link_s = 0.0
    if handle.link is not None:
        size = float(np.mean([handle.store.block_bytes(n) for n in range(len(handle.layers))]))
        link_s = handle.link.latency_s + size / handle.link.bandwidth_bytes_per_s
    return LoadCost(float(np.median(taken)), link_s)
