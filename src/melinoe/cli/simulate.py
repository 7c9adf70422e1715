"""`melinoe simulate`: replay a trace through caches; count what each would load, and how long."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melinoe.cli import models, options, output, prefetching, simulate_inputs
from melinoe.cli.command import option

if TYPE_CHECKING:
    import numpy as np

    from melinoe.cache.simulator import Simulation
    from melinoe.cache.trace import Trace

_SPLIT = "Slots by layer, and options of a policy"
_TIME = "Predicted time"
# Tokens of a segment, in the published measures 2 to 256; ours are as long as an answer.
SEGMENTS = (4, 16)
OF_PREFETCHES = (
    "adjusted_hit_rate",
    "prefetch_precision",
    "prefetch_recall",
    "prefetch_waste_per_token",
)


def command(
    trace: Annotated[Path, typer.Argument(help="A trace file that `melinoe trace` wrote.")],
    slots: Annotated[
        list[str] | None,
        option(
            "Slots in each layer, as 8, or layer by layer, as 6,8,10,8. Repeatable. "
            "Default: a quarter of the experts."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        option(
            "Which resident expert is evicted first: belady, lfru, lfu, lru, score, static, "
            "or a policy of an installed package. Repeatable. Default: lru, lfu and belady."
        ),
    ] = None,
    cold: Annotated[bool, option("Empty the cache before every sequence.")] = False,
    curve: Annotated[bool, option("Print the miss rate of every number of slots instead.")] = False,
    locality: Annotated[
        bool,
        option("Print measures that no cache decides instead: reuse, SRP(m), SCH(m, rho), ..."),
    ] = False,
    out: options.RecordsOut = None,
    as_json: options.AsJson = False,
    policy_option: Annotated[
        list[str] | None,
        option("An option of the one policy named, as in gamma=0.5. Repeatable.", _SPLIT),
    ] = None,
    allocate: Annotated[
        bool,
        option("Also share out the same slots over the layers by their miss-ratio curves.", _SPLIT),
    ] = False,
    allocate_from: Annotated[
        Path | None,
        option("Share them out by this trace's curves. Default: the same trace's.", _SPLIT),
    ] = None,
    prefetch: Annotated[
        list[str] | None,
        option(
            f"{prefetching.HELP} Or a JSON file of lists: sequence -> layer -> ids. "
            "Repeatable. Default: predictor if --predictor is given, else none. next-router needs "
            "a trace recorded with --guesses.",
            options.AHEAD,
        ),
    ] = None,
    predictor: prefetching.PredictorDir = None,
    prefetch_at: prefetching.Moment = None,
    popularity: Annotated[
        Path | None,
        option(
            "Counts for the policy static and --prefetch popularity: a trace, or imported "
            "statistics. Default: the trace itself.",
            options.AHEAD,
        ),
    ] = None,
    link: Annotated[
        str | None,
        option(
            "Predict time over this link from host to GPU: 25GB/s, or a name as pcie4x16.", _TIME
        ),
    ] = None,
    link_latency: Annotated[str, option("Latency of each transfer, as in 10us.", _TIME)] = "0s",
    copy_time: Annotated[
        str, option("Host time of each copy that the link does not hide, as in 50us.", _TIME)
    ] = "0s",
    device_bandwidth: Annotated[
        str | None, option("Bandwidth of the GPU's memory, as in 3.35TB/s.", _TIME)
    ] = None,
    dram: Annotated[
        str | None,
        option("Bandwidth of the host's memory, for misses computed on the CPU: 80GB/s.", _TIME),
    ] = None,
    pass_time: Annotated[
        str | None, option("Measured time of a token with all experts resident, as in 5ms.", _TIME)
    ] = None,
    miss: Annotated[
        str,
        option(
            "On a miss: wait until the expert is loaded; cpu: compute it on the CPU; split: "
            "whichever is faster.",
            _TIME,
        ),
    ] = "wait",
    model: Annotated[
        str | None,
        option(
            "Take sizes from this model's config; `tiny` is the one that ships. It also reads "
            "the prompts for --prefetch predictor. Default for that: as the trace says.",
            _TIME,
        ),
    ] = None,
    expert_size: Annotated[
        str | None, option("Size of one expert instead, as in 12.6MB.", _TIME)
    ] = None,
    backbone_size: Annotated[
        str, option("What a token reads outside the experts, as in 1.2GB.", _TIME)
    ] = "0B",
) -> None:
    """Replay a trace through caches of any size and policy: count loads, and predict time."""
    from melinoe.cache.simulator import simulate
    from melinoe.cache.timing import loads_when, predict
    from melinoe.cache.trace import Trace

    models.check_misses([miss])
    if out is not None and (curve or locality):
        raise typer.BadParameter(
            "a record is of replays, which --curve and --locality leave out; leave those or it out",
            param_hint="--out",
        )
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
        prefetch, prefetch_at, loaded, trace, popular, model, predictor
    )
    figures = simulate_inputs.read_figures(
        loaded, link, link_latency, copy_time, device_bandwidth, dram, pass_time,
        model, expert_size, backbone_size,
    )  # fmt: skip
    if miss != "wait" and figures is None:
        raise typer.BadParameter(f"{miss} needs --link and its figures", param_hint="--miss")
    if miss == "cpu" and None in ahead:
        raise typer.BadParameter(
            "cpu loads nothing on demand, so say what is resident: --prefetch popularity",
            param_hint="--miss",
        )
    split = allocate or allocate_from is not None
    counts, times, replays = [], [], []
    for name in names:
        for size in sizes:
            wanted: list[tuple[str, Any]] = [("as given", size)]
            if split:
                chosen = simulate_inputs.with_popularity(name, own, popular)
                wanted.append(
                    (
                        "allocated",
                        simulate_inputs.allocated(loaded, name, size, chosen, allocate_from, cold),
                    )
                )
            for (how, one), prefetcher in product(wanted, ahead):
                done = simulate(
                    loaded,
                    one,
                    name,
                    policy_options=simulate_inputs.with_popularity(name, own, popular),
                    reset_between_sequences=cold,
                    prefetch=prefetcher,
                    prompts=prompts,
                    load=None if figures is None else loads_when(miss, *figures),
                    steps=figures is not None,
                )
                who = _who_of(done, how if split else None)
                counts.append(who | _counts_of(done))
                replays.append((who, done))
                if figures is not None:
                    times.append(who | {"miss": miss} | predict(done, *figures).metrics())
    if out is not None:
        from melinoe.measure import append_jsonl, replay_record

        predicted = [row["ms_per_token"] for row in times] or [None] * len(replays)
        append_jsonl(out, replay_record(trace.stem, cold, replays, predicted))
        output.say(f"wrote a record to {out}")
    if as_json:
        output.show_json(
            [row | (times[number] if times else {}) for number, row in enumerate(counts)]
        )
        return
    _print_counts(loaded, counts, any(one is not None for one in ahead))
    if times:
        output.show_table(f"predicted time over {link}", [_short(row) for row in times])


def _who_of(done: Simulation, how: str | None) -> dict[str, Any]:
    """Name what was replayed: policy, slots, how they were shared out if asked, prefetch."""
    alike = len(set(done.slots)) == 1
    return {
        "policy": done.policy,
        "slots": done.slots[0] if alike else ",".join(map(str, done.slots)),
        **({"split": how} if how is not None else {}),
        "prefetch": done.prefetch,
    }


def _counts_of(done: Simulation) -> dict[str, Any]:
    """Give the counts of a replay."""
    counters = done.counters
    return {
        "hit_rate": counters.hit_rate("completion"),
        "zero_miss_tokens": counters.zero_miss_share(),
        "transfers_per_token": counters.transfers_per_token(),
        "prefetch_per_token": counters.prefetch_per_token(),
        "prefill_transfers_per_token": counters.transfers_per_token("prompt"),
        **{name: counters.metrics()[name] for name in OF_PREFETCHES},
    }


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Keep what fits a terminal; the JSON has all."""
    return {
        name: value
        for name, value in row.items()
        if name not in ("miss", "stall_ms_per_token", "prefetch_ms_per_token")
    }


def _print_counts(trace: Trace, counts: list[dict[str, Any]], prefetched: bool) -> None:
    """Print the counts, and those of a prefetch in a table of their own."""
    hidden = OF_PREFETCHES if prefetched else ("prefetch", *OF_PREFETCHES)
    output.show_table(
        f"{trace.num_sequences} sequences, {trace.num_experts} experts, "
        f"top-{trace.top_k}, {trace.num_layers} layers",
        [{k: v for k, v in row.items() if k not in hidden} for row in counts],
    )
    if prefetched:
        first = ("policy", "slots", "split", "prefetch", "prefetch_per_token", *OF_PREFETCHES)
        output.show_table(
            "what was loaded ahead", [{k: row[k] for k in first if k in row} for row in counts]
        )


def _print_curve(
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
            policy_options=simulate_inputs.with_popularity(name, own, popular),
            reset_between_sequences=cold,
        ).miss_rate()
        for name in names
    }
    rows = [
        {"slots": count + 1, **{name: float(rate[count]) for name, rate in rates.items()}}
        for count in range(trace.num_experts)
    ]
    if as_json:
        output.show_json(rows)
        return
    output.show_table("miss rate of the completion, by slots in each layer", rows)


def _print_locality(trace: Trace, as_json: bool) -> None:
    """Print the measures of locality that no cache decides."""
    import numpy as np

    from melinoe.cache.locality import distinct_experts, experts_per_sequence, reuse, sch, srp
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
        output.show_json(values)
        return
    output.show_table(
        "locality of the completions", [{"measure": k, "value": v} for k, v in values.items()]
    )
