"""`melinoe simulate`: replay a trace through caches; count what each would load, and how long."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import one_of, option
from melinoe.config import MISSES, QUARTER, experts_in_share

if TYPE_CHECKING:
    from melinoe.cache.simulator import Simulation
    from melinoe.cache.timing import Work
    from melinoe.cache.trace import Trace

_TIME = "Predicted time, with --link"


def command(
    trace: options.TraceFile,
    slots: Annotated[
        list[str] | None,
        option("Slots in each layer: 8, or 6,8,10,8. Repeatable. Default: a quarter."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        option("Which expert is evicted first. Repeatable. Default: lru, lfu, belady."),
    ] = None,
    cold: Annotated[bool, option("Empty the cache before every sequence.")] = False,
    as_json: options.AsJson = False,
    prefetch: options.Prefetches = None,
    predictor: options.PredictorDir = None,
    popularity: Annotated[
        Path | None,
        option("Trace that static and popularity count in. Default: this one.", options.AHEAD),
    ] = None,
    link: options.Link = None,
    link_latency: options.LinkLatency = "0s",
    device_bandwidth: options.DeviceBandwidth = None,
    dram: options.Dram = None,
    pass_time: Annotated[
        str | None, option("Measured time of a token with all experts resident: 5ms.", _TIME)
    ] = None,
    miss: Annotated[str, option("On a miss: wait, cpu or split.", _TIME)] = "wait",
    model: Annotated[
        str | None, option("Take sizes from this model; it also reads prompts.", _TIME)
    ] = None,
    expert_size: Annotated[str | None, option("Size of one expert, as in 12.6MB.", _TIME)] = None,
) -> None:
    """Replay a trace through caches of any size and policy: count loads, and predict time."""
    from melinoe.cache.locality import popularity as count
    from melinoe.cache.simulator import simulate
    from melinoe.cache.timing import Machine, loads_when, predict
    from melinoe.cache.trace import Trace
    from melinoe.plan.hardware import find_bandwidth, parse_seconds

    one_of(miss, MISSES, "--miss")
    loaded = Trace.load(trace)
    popular = count(loaded) if popularity is None else models.count_choices(popularity, loaded)
    quarter = str(experts_in_share(QUARTER, loaded.num_experts))
    sizes = [_slots(text, loaded) for text in slots or [quarter]]
    ahead = models.prefetchers(prefetch, predictor, popular)
    prompts = _bind([one for one in ahead.values() if one is not None], loaded, trace, model)
    figures = None

    def rate(text: str | None, part: str) -> float | None:
        return None if text is None else find_bandwidth(text, part).bytes_per_s

    if link is not None:
        machine = Machine(
            link_bytes_per_s=find_bandwidth(link, "link").bytes_per_s,
            link_latency_s=parse_seconds(link_latency),
            device_bytes_per_s=rate(device_bandwidth, "device memory"),
            dram_bytes_per_s=rate(dram, "DRAM"),
            pass_s=None if pass_time is None else parse_seconds(pass_time),
        )
        figures = (machine, _work(loaded, model, expert_size))
    if miss != "wait" and figures is None:
        raise typer.BadParameter(f"{miss} needs --link and its figures", param_hint="--miss")
    if miss == "cpu" and None in ahead.values():
        raise typer.BadParameter(
            "cpu loads nothing on demand, so say what is resident: --prefetch popularity",
            param_hint="--miss",
        )
    rows, counted, timed = [], list[str](), list[str]()
    load = None if figures is None else loads_when(miss, *figures)
    how: dict[str, Any] = {"reset_between_sequences": cold, "prompts": prompts, "load": load}
    how["steps"] = figures is not None
    for name in policy or ["lru", "lfu", "belady"]:
        own = {"popularity": popular} if name == "static" else {}
        for size in sizes:
            for one in ahead.values():
                done = simulate(loaded, size, name, policy_options=own, prefetch=one, **how)
                who, counts = _who_of(done), _counts_of(done)
                times = {"miss": miss} | predict(done, *figures).metrics() if figures else {}
                counted, timed = [*who, *counts], [*who, *times]
                rows.append(who | counts | times)
    if as_json:
        output.show_json(rows)
        return

    def show(title: str, names: list[str], hidden: tuple[str, ...]) -> None:
        shown = [name for name in names if name not in hidden]
        output.show_table(title, [{name: row[name] for name in shown} for row in rows])

    of_prefetches = ("prefetch", "prefetch_per_token", "adjusted_hit_rate")
    about = f"{loaded.num_sequences} sequences, {loaded.num_experts} experts"
    about += f", top-{loaded.top_k}, {loaded.num_layers} layers"
    show(about, counted, () if any(ahead.values()) else of_prefetches)
    if figures:
        wide = ("miss", "stall_ms_per_token", "prefetch_ms_per_token")  # for a terminal
        show(f"predicted time over {link}", timed, wide)


def _slots(text: str, trace: Trace) -> int | list[int]:
    """Read --slots: one number, or one for each layer."""
    from melinoe.errors import MelinoeError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a number nor numbers with commas", param_hint="--slots"
        ) from None
    if len(numbers) not in (1, trace.num_layers):
        raise MelinoeError(
            f"slots are given for {len(numbers)} layers, and the trace has {trace.num_layers}; "
            "give one number for each, or one for all"
        )
    return numbers if len(numbers) > 1 else numbers[0]


def _bind(
    prefetchers: list[Any], trace: Trace, path: Path, model: str | None
) -> list[list[int]] | None:
    """Bind prefetchers that read prompts to the traced model; the prompts, if any reads them."""
    reading = [one for one in prefetchers if one.uses_ids]
    if not reading:
        return None
    from melinoe.predictor import load_prompts

    prompts = load_prompts(path, trace)
    backbone, tokenizer = models.open_backbone(trace, path, model)
    for one in reading:
        one.bind(backbone, tokenizer)
    return prompts


def _work(trace: Trace, model: str | None, expert_size: str | None) -> Work:
    """Give the bytes of an expert, and what else a token reads where the model is known."""
    from melinoe.cache.timing import Work
    from melinoe.errors import HardwareError
    from melinoe.host_memory import parse_bytes

    if (model is None) == (expert_size is None):
        raise HardwareError(
            "time needs the size of an expert; give either --model or --expert-size"
        )
    if model is None:
        return Work(expert_bytes=parse_bytes(expert_size or ""))
    from melinoe.plan.facts import model_facts
    from melinoe.plan.planner import check_shape

    facts = model_facts(models.resolve(model))
    check_shape(trace, facts)
    block, read, kv = facts.layers[0].block_bytes, facts.read_bytes, facts.kv_bytes or 0
    return Work(expert_bytes=block, backbone_bytes=read, kv_bytes=kv)


def _who_of(done: Simulation) -> dict[str, Any]:
    """Name what was replayed: policy, slots, prefetch."""
    slots = done.slots[0] if len(set(done.slots)) == 1 else ",".join(map(str, done.slots))
    return {"policy": done.policy, "slots": slots, "prefetch": done.prefetch}


def _counts_of(done: Simulation) -> dict[str, Any]:
    counters = done.counters
    return {
        "hit_rate": counters.hit_rate("completion"),
        "zero_miss_tokens": counters.zero_miss_share(),
        "transfers_per_token": counters.transfers_per_token(),
        "prefetch_per_token": counters.prefetch_per_token(),
        "prefill_transfers_per_token": counters.transfers_per_token("prompt"),
        "adjusted_hit_rate": counters.adjusted_hit_rate("completion"),
    }
