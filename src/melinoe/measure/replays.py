"""Replays of one trace to the record that a report shows as a table, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION
from melinoe.cache.simulator import Simulation
from melinoe.stats import bootstrap


def replay_record(
    label: str,
    cold: bool,
    replays: Sequence[tuple[Mapping[str, Any], Simulation]],
    ms_per_token: Sequence[float | None],
) -> dict[str, Any]:
    """
    Return a benchmark record with a row for each replay; means have intervals over sequences.

    Args:
        label: Of the trace.
        cold: Whether every sequence started from an empty cache.
        replays: What was replayed, in words, and what came of it.
        ms_per_token: What the time model says of each; None where it was not asked.
    """
    rows = [
        {**who, **_estimates(done), "predicted_ms": milliseconds}
        for (who, done), milliseconds in zip(replays, ms_per_token, strict=True)
    ]
    start = "each from an empty cache" if cold else "one after the other"
    sequences = len(replays[0][1].sequences) if replays else 0
    return {
        "benchmark": f"replay-{label}",
        "title": f"Simulated: {label}",
        "result": rows,
        "notes": [
            f"{sequences} sequences of a trace, {start}; completions alone. Intervals are over "
            "sequences; transfers are experts copied on demand, per token and all layers."
        ],
    }


def _estimates(done: Simulation) -> dict[str, Any]:
    """Rates of the completion over sequences, numerators and denominators together."""

    def over(name: str) -> np.ndarray:
        values = [getattr(one, name)[COMPLETION] for one in done.per_sequence]
        return np.array([np.sum(value) for value in values])

    uses, tokens = over("uses"), over("tokens")
    if not uses.any() or not tokens.any():
        return {}
    found = {
        "hit_rate": bootstrap(over("hits"), uses),
        "zero_miss_tokens": bootstrap(over("zero_miss_tokens"), tokens),
        "transfers_per_token": bootstrap(over("loads"), tokens),
    }
    ahead = np.array([one.prefetch_loads.sum() for one in done.per_sequence])
    if ahead.any():
        found["prefetched_per_token"] = bootstrap(ahead, tokens)
    return {name: value.to_dict() for name, value in found.items()}
