"""Turn a trace into the records that a report shows: locality, curves by slots, rates."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION
from melinoe.cache.curves import unit_costs
from melinoe.cache.locality import distinct_experts, experts_per_sequence, popularity, reuse
from melinoe.cache.simulator import COMPILED_POLICIES, simulate
from melinoe.cache.trace import Trace
from melinoe.config import QUARTER, experts_in_share
from melinoe.errors import DataError
from melinoe.stats import bootstrap

# A curve is drawn through so many numbers of slots at most.
_POINTS = 16


def trace_records(
    trace: Trace,
    model: str,
    policies: Sequence[str] = COMPILED_POLICIES,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[dict[str, Any]]:
    """
    Return a record of kind ``locality`` and of each policy one of kind ``curve``, of completions.

    Every sequence starts from an empty cache. Popularity, which the policy ``static`` goes by, is
    counted on the trace itself: with hindsight, which is that policy's best case. A compiled policy
    takes seconds, any other minutes; *progress* is told how many of how many replays are done.
    """
    names = list(dict.fromkeys(policies))
    sizes = np.unique(np.linspace(min(trace.top_k, trace.num_experts), trace.num_experts, _POINTS))
    slots = sorted({int(size) for size in sizes} | {experts_in_share(QUARTER, trace.num_experts)})
    done, of = 0, len(names) * len(slots)

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, of)

    found = [locality_record(trace, model)]
    for name in names:
        given = {"popularity": popularity(trace)} if name == "static" else {}
        curve = curve_record(trace, model, name, slots, progress=step, **given)
        del curve["policy_options"]  # popularity is too long for a record
        found.append(curve)
    return found


def locality_record(trace: Trace, model: str) -> dict[str, Any]:
    """
    Return the record of kind ``locality``, of completion tokens alone.

    ``experts_per_sequence`` holds one mean over layers per sequence, ``distinct_experts`` the mean
    over layers of what the whole trace used: small there is collapse, small per sequence is
    locality.
    """
    used = experts_per_sequence(trace)
    used = used[~np.isnan(used)]
    if used.size == 0:
        raise DataError("the trace has no completion tokens; generate at least two per prompt")
    again = reuse(trace)
    return {
        "kind": "locality",
        "model": model,
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "layers": trace.num_layers,
        "experts_per_sequence": used.tolist(),
        "experts_per_sequence_mean": bootstrap(used).to_dict(),
        "reuse": bootstrap(again[~np.isnan(again)]).to_dict(),
        "distinct_experts": float(distinct_experts(trace).mean()),
    }


def curve_record(
    trace: Trace,
    model: str,
    policy: str,
    slots: Sequence[int],
    progress: Callable[[], None] = lambda: None,
    **policy_options: Any,
) -> dict[str, Any]:
    """
    Return the record of kind ``curve``: hit rate and transfers of completions by slots, simulated.

    *slots* are numbers per layer to try; *progress* is called once for each that is done.
    """
    options: Any = {"policy_options": policy_options, "reset_between_sequences": True}
    costs = unit_costs(trace, slots, policy, progress=progress, **options)
    return {
        "kind": "curve",
        "model": model,
        "policy": policy,
        "policy_options": policy_options,
        "num_experts": trace.num_experts,
        "slots": list(slots),
        "hit_rate": [bootstrap(hits, costs.uses).to_dict() for hits in costs.hits],
        "transfers_per_token": [bootstrap(one, costs.tokens).to_dict() for one in costs.loads],
    }


def completion_counts(
    trace: Trace, slots: int, policy: str, **policy_options: Any
) -> dict[str, list[int]]:
    """Simulate, and count ``uses``, ``hits``, ``loads``, ``tokens`` of each completion."""
    options = policy_options or None
    done = simulate(trace, slots, policy, reset_between_sequences=True, policy_options=options)
    return {
        name: [int(np.sum(getattr(one, name)[COMPLETION])) for one in done.per_sequence]
        for name in ("uses", "hits", "loads", "tokens")
    }
