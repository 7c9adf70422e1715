"""What `melinoe simulate` prints: counts, curves, and locality that no cache decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from melinoe.cli import options
from melinoe.cli.simulate_inputs import with_popularity

if TYPE_CHECKING:
    import numpy as np

    from melinoe.cache.simulation import Simulation
    from melinoe.cache.trace import Trace

# Tokens of a segment, in the published measures 2 to 256; ours are as long as an answer.
SEGMENTS = (4, 16)
OF_PREFETCHES = (
    "adjusted_hit_rate",
    "prefetch_precision",
    "prefetch_recall",
    "prefetch_waste_per_token",
)


def who_of(done: Simulation, how: str | None) -> dict[str, Any]:
    """What was replayed: policy, slots, how they were split if that was asked, prefetch."""
    alike = len(set(done.slots)) == 1
    return {
        "policy": done.policy,
        "slots": done.slots[0] if alike else ",".join(map(str, done.slots)),
        **({"split": how} if how is not None else {}),
        "prefetch": done.prefetch,
    }


def counts_of(done: Simulation) -> dict[str, Any]:
    """What it counted."""
    counters = done.counters
    return {
        "hit_rate": counters.hit_rate("completion"),
        "zero_miss_tokens": counters.zero_miss_share(),
        "transfers_per_token": counters.transfers_per_token(),
        "prefetch_per_token": counters.prefetch_per_token(),
        "prefill_transfers_per_token": counters.transfers_per_token("prompt"),
        **{name: counters.metrics()[name] for name in OF_PREFETCHES},
    }


def short(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal; the rest stands in the JSON."""
    return {
        name: value
        for name, value in row.items()
        if name not in ("miss", "stall_ms_per_token", "prefetch_ms_per_token")
    }


def print_counts(trace: Trace, counts: list[dict[str, Any]], prefetched: bool) -> None:
    """Print the counts, and what was loaded ahead in a table of its own."""
    hidden = OF_PREFETCHES if prefetched else ("prefetch", *OF_PREFETCHES)
    options.show_table(
        f"{trace.num_sequences} sequences, {trace.num_experts} experts, "
        f"top-{trace.top_k}, {trace.num_layers} layers",
        [{k: v for k, v in row.items() if k not in hidden} for row in counts],
    )
    if prefetched:
        first = ("policy", "slots", "split", "prefetch", "prefetch_per_token", *OF_PREFETCHES)
        options.show_table(
            "what was loaded ahead", [{k: row[k] for k in first if k in row} for row in counts]
        )


def print_curve(
    trace: Trace,
    names: list[str],
    own: dict[str, Any],
    popular: np.ndarray,
    cold: bool,
    as_json: bool,
) -> None:
    """Print the miss rate of every number of slots, one column for each policy."""
    from melinoe.cache.curves import miss_curves

    rates = {
        name: miss_curves(
            trace,
            name,
            policy_options=with_popularity(name, own, popular),
            reset_between_sequences=cold,
        ).miss_rate()
        for name in names
    }
    rows = [
        {"slots": count + 1, **{name: float(rate[count]) for name, rate in rates.items()}}
        for count in range(trace.num_experts)
    ]
    if as_json:
        options.show_json(rows)
        return
    options.show_table("miss rate of the completion, by slots in each layer", rows)


def print_locality(trace: Trace, as_json: bool) -> None:
    """Print what no cache decides."""
    import numpy as np

    from melinoe.cache.locality import distinct_experts, experts_per_sequence, reuse
    from melinoe.cache.segments import sch, srp
    from melinoe.errors import MelinoeError

    def mean(values: np.ndarray) -> float | None:
        known = values[~np.isnan(values)]
        return float(known.mean()) if known.size else None

    values: dict[str, Any] = {
        "experts_per_sequence": mean(experts_per_sequence(trace)),
        "reuse": mean(reuse(trace)),
        "distinct_experts": float(distinct_experts(trace).mean()),
    }
    for m in SEGMENTS:
        try:
            values[f"srp({m})"] = srp(trace, m)
            values[f"sch({m}, 2)"] = sch(trace, m, min(2, trace.num_experts / trace.top_k))
        except MelinoeError:  # no sequence is that long, or none has a completion
            values[f"srp({m})"] = values[f"sch({m}, 2)"] = None
    if as_json:
        options.show_json(values)
        return
    options.show_table(
        "locality of the completions", [{"measure": k, "value": v} for k, v in values.items()]
    )
