"""`melinoe simulate`: what a trace would have cost with any cache, and how long it would take."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import options, prefetching, simulate_inputs, simulate_tables


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
            help="belady, lfru, lfu, lru, score, static, or one of an installed "
            "package; may be repeated. Default: lru, lfu and belady."
        ),
    ] = None,
    policy_option: Annotated[
        list[str] | None,
        typer.Option(help="Of the policy, as in gamma=0.5; may be repeated. For one policy only."),
    ] = None,
    cold: Annotated[bool, typer.Option(help="Start every sequence with an empty cache.")] = False,
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
            "sequence -> layer -> ids. May be repeated. Default: predictor if --predictor is "
            "given, else none. next-router needs a trace recorded with --guesses."
        ),
    ] = None,
    predictor: prefetching.PredictorDir = None,
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
            "for --prefetch predictor; default there: the model the trace names."
        ),
    ] = None,
    expert_size: Annotated[
        str | None, typer.Option(help="Bytes of one expert instead, as in 12.6MB.")
    ] = None,
    backbone_size: Annotated[
        str, typer.Option(help="Bytes outside the experts that a token reads, as in 1.2GB.")
    ] = "0B",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Append a record of it to this .jsonl, with intervals, for `melinoe report`."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Replay a trace through caches of any size and policy: counts, and time if told the link."""
    from melinoe.cache.misses import loads_when
    from melinoe.cache.simulator import simulate
    from melinoe.cache.timing import predict
    from melinoe.cache.trace import Trace

    simulate_inputs.check_words(miss, overlap)
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
        return simulate_tables.print_locality(loaded, as_json)
    if curve:
        return simulate_tables.print_curve(loaded, names, own, popular, cold, as_json)
    sizes = [
        simulate_inputs.read_slots(text, loaded)
        for text in slots or [str(max(1, loaded.num_experts // 4))]
    ]
    ahead, prompts = simulate_inputs.read_prefetches(
        prefetch, prefetch_at, loaded, trace, popular, model, predictor
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
                who = simulate_tables.who_of(done, how if split else None)
                counts.append(who | simulate_tables.counts_of(done))
                replays.append((who, done))
                if figures is not None:
                    times.append(who | {"miss": miss} | predict(done, *figures).metrics())
    if out is not None:
        from melinoe.measure import append_jsonl, replay_record

        predicted = [row["ms_per_token"] for row in times] or [None] * len(replays)
        append_jsonl(out, replay_record(trace.stem, cold, replays, predicted))
        options.say(f"wrote a record to {out}")
    if as_json:
        options.show_json(
            [row | (times[number] if times else {}) for number, row in enumerate(counts)]
        )
        return
    simulate_tables.print_counts(loaded, counts, any(one is not None for one in ahead))
    if times:
        options.show_table(
            f"predicted time over {link}", [simulate_tables.short(row) for row in times]
        )
