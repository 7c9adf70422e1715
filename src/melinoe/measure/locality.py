"""A trace to records: how few experts sequences use, and what caches of each size would hold."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION
from melinoe.cache.curves import unit_costs
from melinoe.cache.locality import distinct_experts, experts_per_sequence, reuse
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.errors import DataError
from melinoe.stats import bootstrap


def locality_record(trace: Trace, model: str) -> dict[str, Any]:
    """
    Return the record of kind ``locality``, of completion tokens alone.

    ``experts_per_sequence`` holds one mean over layers per sequence with a completion, ``reuse``
    is an estimate over sequences, ``distinct_experts`` the mean over layers of what the whole
    trace used: small there is collapse, small per sequence is locality.

    Raises:
        DataError: the trace has no completion tokens.
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


def completion_counts(
    trace: Trace, slots: int, policy: str, cold: bool = True, **policy_options: Any
) -> dict[str, list[int]]:
    """
    Count what each sequence's completion would have cost with other slots or another policy.

    Args:
        trace: One sequence per forward pass, as `melinoe.generate.trace_prompts` makes it.
        slots: Slots of each layer.
        policy: ``lru``, ``lfu``, ``belady``, …
        cold: Empty the cache before each sequence; else it keeps what the one before left.
        policy_options: What the policy takes.

    Returns:
        ``uses``, ``hits``, ``loads`` of all layers and ``tokens``: one number per sequence, so
        that rates have intervals and two models can be paired.

    Raises:
        MelinoeError: no such policy, or a number of slots that the model cannot have.
    """
    done = simulate(
        trace,
        slots,
        policy,
        reset_between_sequences=cold,
        policy_options=policy_options or None,
    )
    return {
        "uses": [int(one.uses[COMPLETION].sum()) for one in done.per_sequence],
        "hits": [int(one.hits[COMPLETION].sum()) for one in done.per_sequence],
        "loads": [int(one.loads[COMPLETION].sum()) for one in done.per_sequence],
        "tokens": [int(one.tokens[COMPLETION]) for one in done.per_sequence],
    }


def curve_record(
    trace: Trace,
    model: str,
    policy: str,
    slots: Sequence[int],
    cold: bool = True,
    progress: Callable[[], None] = lambda: None,
    **policy_options: Any,
) -> dict[str, Any]:
    """
    Return the record of kind ``curve``: hit rate and transfers of completions by slots, simulated.

    Args:
        trace: One sequence per forward pass, as `melinoe.generate.trace_prompts` makes it.
        model: Label of the model.
        policy: ``lru``, ``lfu``, ``belady``, …
        slots: Numbers of slots per layer to try.
        cold: Empty the cache before each sequence; else it keeps what the one before left.
        progress: Called once for each number of slots that is done.
        policy_options: What the policy takes.

    Raises:
        DataError: no completion tokens.
        MelinoeError: no such policy, or a number of slots that the model cannot have.
    """
    costs = unit_costs(
        trace,
        slots,
        policy,
        policy_options=policy_options,
        reset_between_sequences=cold,
        progress=progress,
    )
    rates = [bootstrap(hits, costs.uses).to_dict() for hits in costs.hits]
    transfers = [bootstrap(loads, costs.tokens).to_dict() for loads in costs.loads]
    return {
        "kind": "curve",
        "model": model,
        "policy": policy,
        "policy_options": policy_options,
        "num_experts": trace.num_experts,
        "slots": list(slots),
        "hit_rate": rates,
        "transfers_per_token": transfers,
        "cold": cold,
    }
