"""A trace to all that a report shows of one: locality, usage, curves by policy, rates by layer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from melinoe.cache.locality import popularity
from melinoe.cache.simulator import COMPILED_POLICIES, simulate
from melinoe.cache.trace import Trace
from melinoe.config import ServeSettings, experts_in_share
from melinoe.measure.by_layer import hit_rates_by_layer
from melinoe.measure.locality import curve_record, locality_record
from melinoe.measure.usage import usage_record

# A curve is drawn through so many numbers of slots at most.
_POINTS = 16


def trace_records(
    trace: Trace,
    model: str,
    policies: Sequence[str] = COMPILED_POLICIES,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[dict[str, Any]]:
    """
    Return records of kind ``locality``, ``usage``, ``curve`` and ``layers``, all of completions.

    Every sequence starts from an empty cache. Popularity, which the policy ``static`` goes by, is
    counted on the trace itself: with hindsight, which is that policy's best case.

    A compiled policy takes one pass over the trace for all numbers of slots that hold its largest
    request, and a replay for each below; any other takes a replay for each number.

    Args:
        trace: One sequence per forward pass, as `melinoe.generate.trace_prompts` makes it.
        model: Label of the model.
        policies: Names; a policy that is not among the compiled ones takes minutes where those
            take seconds.
        progress: Called with how many of how many replays are done.

    Raises:
        DataError: the trace has no completion tokens.
        MelinoeError: no such policy, or one that needs weights the trace does not hold.
    """
    names = list(dict.fromkeys(policies))
    sizes = np.unique(np.linspace(min(trace.top_k, trace.num_experts), trace.num_experts, _POINTS))
    quarter = experts_in_share(ServeSettings().slots, trace.num_experts)
    slots = sorted({int(size) for size in sizes} | {quarter})
    done, of = 0, len(names) * (len(slots) + 1)

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, of)

    found = [locality_record(trace, model), usage_record(trace, model)]
    options = {name: _options(trace, name) for name in names}
    for name in names:
        found.append(curve_record(trace, model, name, slots, progress=step, **options[name]))
        found[-1].pop("policy_options")  # popularity is long, and no record's business
    for name in names:
        found.append(_layers_record(trace, model, name, quarter, options[name]))
        step()
    return found


def _options(trace: Trace, policy: str) -> dict[str, Any]:
    return {"popularity": popularity(trace)} if policy == "static" else {}


def _layers_record(
    trace: Trace, model: str, policy: str, slots: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Hit rate of each layer over sequences, as the record of kind ``layers``."""
    done = simulate(
        trace, slots, policy, reset_between_sequences=True, policy_options=options or None
    )
    return {
        "kind": "layers",
        "model": model,
        "policy": policy,
        "slots": slots,
        "num_experts": trace.num_experts,
        "hit_rate_by_layer": hit_rates_by_layer(done.per_sequence),
    }
