"""`melinoe simulate`: what a trace would have cost with any cache, and how long it would take."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melinoe.cli import options, prefetching, simulate_inputs

if TYPE_CHECKING:
    import numpy as np

    from melinoe.cache.simulation import Simulation
    from melinoe.cache.trace import Trace

# Tokens of a segment, in the published measures 2 to 256; ours are as long as an answer.
SEGMENTS = (4, 16)
_OF_PREFETCHES = (
    "adjusted_hit_rate",
    "prefetch_precision",
    "prefetch_recall",
    "prefetch_waste_per_token",
)


def command(
    trace: Annotated[Path, typer.Argument(help="A trace file written by `melinoe trace`.")],
    slots: Annotated[
        list[str] | None,
        typer.Option(
            help="Slots in each layer, as 8, or of every layer, as 6,8,10,8; may be repeated. "
            "Default: a quarter of the experts."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="belady, least-stale, lfru, lfu, lru, score, static, or one of an installed "
            "package; may be repeated. Default: lru, lfu and belady."
        ),
    ] = None,
    policy_option: Annotated[
        list[str] | None,
        typer.Option(help="Of the policy, as in gamma=0.5; may be repeated. For one policy only."),
    ] = None,
    cold: Annotated[bool, typer.Option(help="Start every sequence with an empty cache.")] = False,
    shared: Annotated[
        bool, typer.Option(help="All layers share one cache of as many slots as they would have.")
    ] = False,
    allocate: Annotated[
        bool,
        typer.Option(
            help="Also split the same slots over layers by their miss-ratio curves, per policy."
        ),
    ] = False,
    allocate_from: Annotated[
        Path | None, typer.Option(help="Make that split from this trace; default: the same one.")
    ] = None,
    curve: Annotated[
        bool, typer.Option(help="Print the miss rate of every number of slots instead.")
    ] = False,
    locality: Annotated[
        bool,
        typer.Option(help="Print what no cache decides instead: reuse, SRP(m), SCH(m, rho), ..."),
    ] = False,
    prefetch: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What is loaded ahead of need: {prefetching.NAMES}; or a JSON file of lists, "
            "sequence -> layer -> ids. May be repeated. Default: what --predictor or --nearest is "
            "for, else none. next-router needs a trace recorded with --guesses."
        ),
    ] = None,
    predictor: prefetching.PredictorDir = None,
    nearest: prefetching.NearestFile = None,
    prefetch_at: prefetching.Moment = None,
    popularity: Annotated[
        Path | None,
        typer.Option(
            help="Count popularity (policy static, prefetch popularity) from this trace or "
            "imported statistics; default: the trace itself."
        ),
    ] = None,
    miss: Annotated[
        str,
        typer.Option(
            help="What a miss does: wait for the load; cpu, be computed there; split, by cost."
        ),
    ] = "wait",
    link: Annotated[
        str | None,
        typer.Option(help="Predict time over this link: 25GB/s, or a name such as pcie4x16."),
    ] = None,
    link_latency: Annotated[str, typer.Option(help="Of each transfer, as in 10us.")] = "0s",
    copy_time: Annotated[
        str, typer.Option(help="Host time of each copy that the link does not hide, as in 50us.")
    ] = "0s",
    device_bandwidth: Annotated[
        str | None, typer.Option(help="Of the memory that holds the slots, as in 3.35TB/s.")
    ] = None,
    dram_bandwidth: Annotated[
        str | None, typer.Option(help="Of the host's memory, for misses it computes: 80GB/s.")
    ] = None,
    pass_time: Annotated[
        str | None,
        typer.Option(help="Measured time of a token with all experts resident, as in 5ms."),
    ] = None,
    overlap: Annotated[
        str, typer.Option(help="none: wait, then compute; hits: compute them meanwhile.")
    ] = "none",
    model: Annotated[
        str | None,
        typer.Option(
            help="Take sizes from this model's config; `tiny` is ours. Its embeddings read prompts "
            "for --prefetch predictor and nearest; default there: the model the trace names."
        ),
    ] = None,
    expert_size: Annotated[
        str | None, typer.Option(help="Bytes of one expert instead, as in 12.6MB.")
    ] = None,
    backbone_size: Annotated[
        str, typer.Option(help="Bytes outside the experts that a token reads, as in 1.2GB.")
    ] = "0B",
    as_json: options.AsJson = False,
) -> None:
    """Replay a trace through caches of any size and policy: counts, and time if told the link."""
    from melinoe.cache.misses import loads_when
    from melinoe.cache.policy import policy_class
    from melinoe.cache.simulator import simulate
    from melinoe.cache.timing import predict
    from melinoe.cache.trace import Trace

    _check_words(miss, overlap)
    loaded = Trace.load(trace)
    popular = simulate_inputs.read_popularity(popularity, loaded)
    names = policy or ["lru", "lfu", "belady"]
    own = simulate_inputs.read_policy_options(policy_option, names)
    if locality:
        return _print_locality(loaded, as_json)
    if curve:
        return _print_curve(loaded, names, own, popular, cold, as_json)
    sizes = [
        simulate_inputs.read_slots(text, loaded)
        for text in slots or [str(max(1, loaded.num_experts // 4))]
    ]
    ahead, prompts = simulate_inputs.read_prefetches(
        prefetch, prefetch_at, loaded, trace, popular, model, predictor, nearest
    )
    figures = simulate_inputs.read_figures(
        loaded, link, link_latency, copy_time, device_bandwidth, dram_bandwidth, pass_time,
        overlap, model, expert_size, backbone_size,
    )  # fmt: skip
    if miss != "wait" and figures is None:
        raise typer.BadParameter(f"{miss} needs --link and its figures", param_hint="--miss")
    if miss == "cpu" and None in ahead:
        raise typer.BadParameter(
            "cpu loads nothing on demand, so say what is resident: --prefetch popularity",
            param_hint="--miss",
        )
    split = allocate or allocate_from is not None
    counts, times = [], []
    for name in names:
        alone = not (shared or policy_class(name).scope == "model")
        for size in sizes:
            wanted: list[tuple[str, Any]] = [("as given", size)]
            if split and alone:
                chosen = _with_popularity(name, own, popular)
                wanted.append(
                    ("allocated", _allocated(loaded, name, size, chosen, allocate_from, cold))
                )
            for (how, one), prefetcher in product(wanted, ahead):
                done = simulate(
                    loaded,
                    one,
                    name,
                    policy_options=_with_popularity(name, own, popular),
                    reset_between_sequences=cold,
                    shared=not alone,
                    prefetch=prefetcher,
                    prompts=prompts,
                    load=None if figures is None else loads_when(miss, *figures),
                    steps=figures is not None,
                )
                who = _who(done, how if split else None)
                counts.append(who | _counts(done))
                if figures is not None:
                    times.append(who | {"miss": miss} | predict(done, *figures).metrics())
    if as_json:
        options.show_json(
            [row | (times[number] if times else {}) for number, row in enumerate(counts)]
        )
        return
    hidden = _OF_PREFETCHES if any(ahead) else ("prefetch", *_OF_PREFETCHES)
    options.show_table(
        f"{loaded.num_sequences} sequences, {loaded.num_experts} experts, "
        f"top-{loaded.top_k}, {loaded.num_layers} layers",
        [{k: v for k, v in row.items() if k not in hidden} for row in counts],
    )
    if any(ahead):
        who_first = ("policy", "slots", "split", "prefetch", "prefetch_per_token")
        options.show_table(
            "what was loaded ahead",
            [{k: row[k] for k in (*who_first, *_OF_PREFETCHES) if k in row} for row in counts],
        )
    if times:
        options.show_table(f"predicted time over {link}", [_short(row) for row in times])


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal; the rest stands in the JSON."""
    return {
        name: value
        for name, value in row.items()
        if name not in ("miss", "stall_ms_per_token", "prefetch_ms_per_token")
    }


def _who(done: Simulation, how: str | None) -> dict[str, Any]:
    alike = len(set(done.slots)) == 1
    return {
        "policy": f"{done.policy}, shared" if done.shared else done.policy,
        "slots": done.slots[0] if alike else ",".join(map(str, done.slots)),
        **({"split": how} if how is not None else {}),
        "prefetch": done.prefetch,
    }


def _counts(done: Simulation) -> dict[str, Any]:
    counters = done.counters
    return {
        "hit_rate": counters.hit_rate("completion"),
        "zero_miss_tokens": counters.zero_miss_share(),
        "transfers_per_token": counters.transfers_per_token(),
        "prefetch_per_token": counters.prefetch_per_token(),
        "prefill_transfers_per_token": counters.transfers_per_token("prompt"),
        **{name: counters.metrics()[name] for name in _OF_PREFETCHES},
    }


def _check_words(miss: str, overlap: str) -> None:
    from melinoe.cache.machine import OVERLAPS
    from melinoe.cache.misses import MISSES

    for name, value, known in (
        ("--miss", miss, MISSES),
        ("--overlap", overlap, OVERLAPS),
    ):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=name)


def _with_popularity(name: str, own: dict[str, Any], popular: np.ndarray) -> dict[str, Any]:
    return {**own, "popularity": popular} if name == "static" else own


def _allocated(
    trace: Trace,
    policy: str,
    size: int | list[int],
    chosen: dict[str, Any],
    source: Path | None,
    cold: bool,
) -> tuple[int, ...]:
    """As many slots as *size* has in all, split by the miss-ratio curves of a trace."""
    from melinoe.cache.allocate import allocate, cost_of
    from melinoe.cache.curves import miss_curves
    from melinoe.cache.residency import check_capacity
    from melinoe.cache.trace import Trace

    for count in size if isinstance(size, list) else [size]:
        check_capacity(trace.num_experts, count)
    fitted = trace if source is None else Trace.load(source)
    fitted.check_model(trace.fingerprint, trace.num_layers, trace.num_experts, trace.top_k)
    curves = miss_curves(fitted, policy, policy_options=chosen, reset_between_sequences=cold)
    return allocate(
        cost_of(curves), sum(size) if isinstance(size, list) else size * len(curves.exact_from)
    )


def _print_curve(
    trace: Trace,
    names: list[str],
    own: dict[str, Any],
    popular: np.ndarray,
    cold: bool,
    as_json: bool,
) -> None:
    from melinoe.cache.curves import miss_curves

    rates = {
        name: miss_curves(
            trace,
            name,
            policy_options=_with_popularity(name, own, popular),
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


def _print_locality(trace: Trace, as_json: bool) -> None:
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
