"""
Share of expert uses that hit: an assumption with a source, or simulated from a trace.

A plan measures nothing, so it gives two ends and says what each rests on.

- Before fine-tuning, without a trace: chance, ``slots / experts``, at both ends. A router that
  spreads its choices evenly hits no more than that, whatever the policy. Real ones do better.
- After fine-tuning, without a trace: misses fewer by what the paper's transfer counts fell, the
  least and the most of its four pairs. That they carry over to this model is the assumption.
- With a trace: the worse and the better of LRU and LFU at these slots, simulated, a cold cache
  before each sequence; Belady's bound beside it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.errors import TraceError
from melinoe.plan.facts import Layer, ModelFacts


@dataclass(frozen=True)
class HitRates:
    """
    A range of hit rates, and what its ends rest on.

    Attributes:
        low: The lower end, in [0, 1].
        high: The upper end.
        source: What both rest on, for people.
        by_policy: Simulated hit rates by policy, if a trace was given.
        simulated: Whether a trace is behind it.
    """

    low: float
    high: float
    source: str
    by_policy: dict[str, float] = field(default_factory=dict)
    simulated: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@cache
def assumptions() -> dict[str, Any]:
    """The data file ``assumptions.json``: each with its source."""
    return json.loads(Path(__file__).with_name("assumptions.json").read_text(encoding="utf-8"))


def by_chance(layers: Sequence[Layer], slots: int) -> HitRates:
    """The hit rate of choices without any locality: slots over experts, weighted by uses."""
    uses = sum(layer.top_k for layer in layers)
    rate = sum(layer.top_k * min(slots / layer.num_experts, 1) for layer in layers) / uses
    return HitRates(
        rate,
        rate,
        "assumed: no locality at all, so as many hits as slots per expert; most routers hit more, "
        "and a trace tells how much",
    )


def after_fine_tuning(before: HitRates) -> HitRates:
    """*before* with misses divided by the paper's falls in transfers, the least and the most."""
    known = assumptions()
    falls = sorted(one["base"] / one["fine_tuned"] for one in known["transfer_ratios"])
    return HitRates(
        1 - (1 - before.low) / falls[0],
        1 - (1 - before.high) / falls[-1],
        f"assumed: misses {falls[0]:.2f} to {falls[-1]:.2f} times fewer than before, as the "
        f"transfers of {known['transfer_ratios_source']}; not measured on this model",
    )


def from_trace(trace: Trace, facts: ModelFacts, slots: int, name: str) -> HitRates:
    """
    Simulate a trace at *slots*: LRU and LFU make the range, Belady the bound.

    The trace is held to the model by its layers, experts and choices. A plan has no weights, so
    it cannot compare the fingerprint, and the source says so.

    Raises:
        TraceError: the trace is of a model of another shape, or has no completion.
    """
    check_shape(trace, facts)
    rates = {}
    for policy in ("lru", "lfu", "belady"):
        done = simulate(trace, min(slots, trace.num_experts), policy, reset_between_sequences=True)
        rate = done.counters.hit_rate("completion")
        if rate is None:
            raise TraceError(f"{name} has no completion to count; trace at least two new tokens")
        rates[policy] = rate
    causal = (rates["lru"], rates["lfu"])
    return HitRates(
        min(causal),
        max(causal),
        f"simulated from {name}: {trace.num_sequences} sequences, cold cache before each, "
        f"{'LRU to LFU' if rates['lru'] <= rates['lfu'] else 'LFU to LRU'}; "
        "its shape is this model's, its weights were not compared",
        rates,
        simulated=True,
    )


def check_shape(trace: Trace, facts: ModelFacts) -> None:
    """
    Make sure that a trace could be of this model.

    Raises:
        TraceError: another number of layers, experts or choices.
    """
    mine = (trace.num_layers, trace.num_experts, trace.top_k)
    theirs = (len(facts.layers), facts.num_experts, facts.top_k)
    if mine != theirs:
        raise TraceError(
            "the trace is of another model: it has {} layers of {} experts, top-{}, and {} has "
            "{} layers of {}, top-{}; give a trace of this model".format(*mine, facts.name, *theirs)
        )
