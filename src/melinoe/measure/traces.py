"""Turn a trace into the records that a report shows: locality, use, curves by slots, rates."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION, Counters
from melinoe.cache.curves import unit_costs
from melinoe.cache.locality import distinct_experts, experts_per_sequence, popularity, reuse
from melinoe.cache.simulator import COMPILED_POLICIES, Simulation, simulate
from melinoe.cache.trace import COMPLETION_ROW, Trace
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
    Return records of kind ``locality``, ``usage``, ``curve`` and ``layers``, all of completions.

    Every sequence starts from an empty cache. Popularity, which the policy ``static`` goes by, is
    counted on the trace itself: with hindsight, which is that policy's best case. A compiled policy
    takes seconds, any other minutes.

    Args:
        trace: One sequence per forward pass, as `melinoe.generate.trace_prompts` makes it.
        model: Label of the model.
        policies: Names.
        progress: Called with how many of how many replays are done.

    Raises:
        DataError: the trace has no completion tokens.
        MelinoeError: no such policy, or one that needs weights the trace does not hold.
    """
    names = list(dict.fromkeys(policies))
    sizes = np.unique(np.linspace(min(trace.top_k, trace.num_experts), trace.num_experts, _POINTS))
    quarter = experts_in_share(QUARTER, trace.num_experts)
    slots = sorted({int(size) for size in sizes} | {quarter})
    done, of = 0, len(names) * (len(slots) + 1)

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, of)

    found = [locality_record(trace, model), usage_record(trace, model)]
    given: dict[str, Any] = (
        {"static": {"popularity": popularity(trace)}} if "static" in names else {}
    )
    for name in names:
        curve = curve_record(trace, model, name, slots, progress=step, **given.get(name, {}))
        del curve["policy_options"]  # popularity is too long for a record
        found.append(curve)
    about = {"kind": "layers", "model": model, "slots": quarter, "num_experts": trace.num_experts}
    for name in names:
        options = given.get(name)
        done_once = simulate(
            trace, quarter, name, reset_between_sequences=True, policy_options=options
        )
        rates = hit_rates_by_layer(done_once.per_sequence)
        found.append({**about, "policy": name, "hit_rate_by_layer": rates})
        step()
    return found


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


def usage_record(trace: Trace, model: str, sequences: int = 24, layers: int = 4) -> dict[str, Any]:
    """
    Return the record of kind ``usage``, of completion tokens alone.

    ``counts`` holds, for each shown layer, one row per sequence with the number of its choices
    that fell on each expert; ``shown_layers`` lists those layers. At most *sequences* are shown,
    the first, and at most *layers*, evenly from the first to the last.

    Raises:
        DataError: the trace has no completion tokens.
    """
    rows = np.flatnonzero(trace.kind == COMPLETION_ROW)
    if rows.size == 0:
        raise DataError("the trace has no completion tokens; generate at least two per prompt")
    shown = np.unique(np.linspace(0, trace.num_layers - 1, layers).round().astype(int))
    present, place = np.unique(trace.sequence[rows], return_inverse=True)
    chosen = trace.experts[rows][:, shown]  # (tokens, layers, top-k); -1 means no expert
    counts = np.zeros((len(shown), len(present), trace.num_experts + 1), dtype=np.int64)
    np.add.at(counts, (np.arange(len(shown))[None, :, None], place[:, None, None], chosen), 1)
    return {
        "kind": "usage",
        "model": model,
        "num_experts": trace.num_experts,
        "layers": trace.num_layers,
        "shown_layers": shown.tolist(),
        "counts": counts[:, :sequences, :-1].tolist(),
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

    Args:
        trace: One sequence per forward pass, as `melinoe.generate.trace_prompts` makes it.
        model: Label of the model.
        policy: ``lru``, ``lfu``, ``belady``, …, with its *policy_options*.
        slots: Numbers of slots per layer to try.
        progress: Called once for each number of slots that is done.

    Raises:
        DataError: no completion tokens.
        MelinoeError: no such policy, or a number of slots that the model cannot have.
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
    """
    Count what each sequence's completion would have cost; arguments as in `curve_record`.

    Returns:
        ``uses``, ``hits``, ``loads`` of all layers and ``tokens``: one number per sequence, so
        that rates have intervals and two models can be paired.

    Raises:
        MelinoeError: no such policy, or a number of slots that the model cannot have.
    """
    options = policy_options or None
    done = simulate(trace, slots, policy, reset_between_sequences=True, policy_options=options)
    return {name: _per_sequence(done, name) for name in ("uses", "hits", "loads", "tokens")}


def _per_sequence(done: Simulation, name: str) -> list[int]:
    """Each sequence's count, of its completion and all layers."""
    return [int(np.sum(getattr(one, name)[COMPLETION])) for one in done.per_sequence]


def hit_rates_by_layer(counters: Iterable[Counters]) -> list[dict[str, Any] | None]:
    """
    Return an estimate of each layer's hit rate of completions, over *counters*, one a sequence.

    None stands for a layer that served no token: of a model with two stacks one may never run.
    """
    listed = list(counters)
    hits = np.array([one.hits[COMPLETION] for one in listed])
    uses = np.array([one.uses[COMPLETION] for one in listed])
    return [
        bootstrap(hits[:, layer], uses[:, layer]).to_dict() if uses[:, layer].any() else None
        for layer in range(uses.shape[1])
    ]


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
        replays: The settings of each replay, and its result.
        ms_per_token: The time model's prediction for each; None where there is none.
    """
    start = "each from an empty cache" if cold else "one after the other"
    sequences = len(replays[0][1].sequences) if replays else 0
    return {
        "benchmark": f"replay-{label}",
        "title": f"Simulated: {label}",
        "result": [
            {**settings, **_estimates(done), "predicted_ms": milliseconds}
            for (settings, done), milliseconds in zip(replays, ms_per_token, strict=True)
        ],
        "notes": [
            f"{sequences} sequences of a trace, {start}; completions alone. Intervals are over "
            "sequences; transfers are experts copied on demand, per token and all layers."
        ],
    }


def _estimates(done: Simulation) -> dict[str, Any]:
    """Rates of the completion over sequences, numerators and denominators together."""
    uses, tokens = _per_sequence(done, "uses"), _per_sequence(done, "tokens")
    if not any(uses) or not any(tokens):
        return {}
    found = {
        "hit_rate": bootstrap(_per_sequence(done, "hits"), uses),
        "zero_miss_tokens": bootstrap(_per_sequence(done, "zero_miss_tokens"), tokens),
        "transfers_per_token": bootstrap(_per_sequence(done, "loads"), tokens),
    }
    prefetched = [int(one.prefetch_loads.sum()) for one in done.per_sequence]
    if any(prefetched):
        found["prefetched_per_token"] = bootstrap(prefetched, tokens)
    return {name: value.to_dict() for name, value in found.items()}
