"""`melinoe plan`: say from a config alone what fits, how fast it can be, and what bounds it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option

if TYPE_CHECKING:
    from melinoe.plan.planner import Plan

_RATES = "Hit rates from"
_INSTEAD = "Instead of a plan"


def command(
    given: typer.Context,
    model: options.ModelOrConfigIfAny = None,
    card: Annotated[
        str | None, option("A GPU by name: rtx4090, l4, h100, ...; a wrong name lists them all.")
    ] = None,
    gpu_memory: Annotated[
        str | None, option("Memory of the GPU, as in 8GiB. Default: all of --card's.")
    ] = None,
    ram: Annotated[
        str | None, option("Memory of the host, as in 32GiB. Default: enough for all experts.")
    ] = None,
    context: Annotated[int, option("Longest text, in tokens.", min=1)] = 4096,
    batch: Annotated[int, option("Sequences decoded together.", min=1)] = 1,
    bits: Annotated[
        int | None, option("Bits of a stored weight: 16, 8 or 4. Default: as the config says.")
    ] = None,
    as_json: options.AsJson = False,
    trace: Annotated[Path | None, option("A trace of it.", _RATES)] = None,
    tuned_trace: Annotated[Path | None, option("A trace of it fine-tuned.", _RATES)] = None,
    link: options.Link = None,
    link_latency: options.LinkLatency = "0s",
    device_bandwidth: options.DeviceBandwidth = None,
    disk: Annotated[
        str | None, option("Bandwidth of the disk, as in 7GB/s or nvme4.", options.MACHINE)
    ] = None,
    reserve: Annotated[
        str | None, option("GPU memory kept free. Default: a tenth, at most 1GiB.", options.MACHINE)
    ] = None,
    cards: Annotated[
        bool, option("Print some models on cards of 8 to 24 GB.", _INSTEAD, name="--cards")
    ] = False,
    finetune: Annotated[
        bool,
        option(
            "Plan a fine-tuning by --batch (8) of --context (512).", _INSTEAD, name="--finetune"
        ),
    ] = False,
    lora_rank: Annotated[
        int | None, option("Rank of the updates of --finetune.", _INSTEAD, min=1)
    ] = None,
    out: Annotated[Path | None, option("Write --cards to this .json file.", _INSTEAD)] = None,
) -> None:
    """Plan a model on a machine from its config alone: what fits, how fast, and the bottleneck."""
    if out is not None and not cards:
        raise typer.BadParameter("only --cards writes a record", param_hint="--out")
    idle = (bits, trace, tuned_trace, device_bandwidth, reserve)
    if finetune and any(one is not None for one in idle):
        raise typer.BadParameter(
            "takes --card, --gpu-memory, --ram, --link, --disk, --batch, --context and --lora-rank",
            param_hint="--finetune",
        )
    if lora_rank is not None and not finetune:
        raise typer.BadParameter("belongs to --finetune", param_hint="--lora-rank")
    output.quiet()
    if cards:
        _show_cards(out, as_json, finetune)
        return
    if model is None:
        raise typer.BadParameter("name a model, or use --cards", param_hint="MODEL")
    machine: dict[str, Any] = {"gpu_memory": gpu_memory, "card": card, "ram": ram}
    machine |= {"link": link, "disk": disk}
    if finetune:
        said = {"context": ("max_length", context), "batch": ("batch_size", batch)}
        sizes = dict(said[name] for name in said if models.is_given(given, name))
        _show_finetuning(model, sizes | {"lora_rank": lora_rank}, machine, as_json)
        return
    from melinoe.cache.trace import Trace
    from melinoe.host_memory import host_memory
    from melinoe.plan.hardware import parse_seconds
    from melinoe.plan.planner import plan

    done = plan(
        models.resolve(model),
        **machine,
        device_bandwidth=device_bandwidth,
        reserve=reserve,
        context=context,
        batch=batch,
        bits=bits,
        latency_s=parse_seconds(link_latency),
        trace=None if trace is None else Trace.load(trace),
        tuned_trace=None if tuned_trace is None else Trace.load(tuned_trace),
    )
    left = host_memory()
    if as_json:
        host = None if left is None else left._asdict()
        output.show_json(done.to_dict() | {"host_memory_here": host})
    else:
        _show(model, done, left)


def _show_finetuning(
    model: str, settings: dict[str, Any], machine: dict[str, str | None], as_json: bool
) -> None:
    from melinoe.config import FinetuneSettings
    from melinoe.host_memory import format_bytes as size
    from melinoe.plan.finetuning import plan_finetuning

    asked = FinetuneSettings(**settings)
    done = plan_finetuning(models.resolve(model), asked, **machine)
    if as_json:
        output.show_json(done.to_dict())
        return
    print(
        f"{model}, {asked.batch_size} texts of {asked.max_length} tokens a step: {done.plan}.\n"
        f"A step reads {size(done.reads_bytes)} of experts if its tokens use all of them: at least "
        f"{done.step_s:.3g} s at {done.rate}, {done.step_s / 3.6:.3g} h for 1,000 steps. Where "
        "computing takes longer, that is the bound."
    )


def _show_cards(out: Path | None, as_json: bool, finetune: bool) -> None:
    from melinoe.measure import write_json
    from melinoe.plan import cards, finetuning

    record = (finetuning if finetune else cards).forecast_record()
    if out is not None:
        write_json(out, record)
        output.say(f"wrote {out}")
    if as_json:
        output.show_json(record["result"])
    else:
        output.show_table(record["title"], record["result"])
        print(*record["notes"])


def _show(model: str, done: Plan, left: Any) -> None:
    """Print a plan as tables and sentences."""
    from melinoe.host_memory import format_bytes as size

    facts = done.facts
    held = facts.dtype if facts.packed is None else f"{facts.dtype} where not packed"
    kv = "not known" if facts.kv_bytes is None else size(done.batch * facts.kv_bytes)
    slots = f"{done.slots} of {facts.num_experts} experts in each of {len(facts.layers)} layers; a "
    rows = [
        ("config", "", facts.source),
        ("backbone", size(facts.backbone_bytes), f"{held}, every parameter but the experts"),
        ("keys and values", kv, f"{done.batch} x {facts.context} tokens; {facts.kv_source}"),
        ("kept free", size(done.reserve_bytes) if done.reserve_bytes else "0", ""),
        ("expert slots", size(done.slot_bytes), f"{slots}token uses {facts.top_k}"),
        ("all experts", size(facts.expert_bytes), _where(done)),
    ]
    output.show_table(
        f"{model} ({facts.model_type}) in {size(done.gpu_memory_bytes)}",
        [{"what": what, "bytes": amount, "how": how} for what, amount, how in rows],
    )
    scenarios = (
        ("as it is", done.before, done.speed_before),
        ("fine-tuned for locality", done.after, done.speed_after),
    )
    several = f"; all {done.batch} sequences together" if done.batch > 1 else ""
    output.show_table(
        f"Expected, not measured{several}",
        [
            {
                "": name,
                "hit rate": _range(rates.low, rates.high, percent=True),
                "tokens/s": _range(found.low, found.high),
                "fast end bound by": found.bottleneck,
                "slow end mostly": found.slow_bottleneck,
            }
            for name, rates, found in scenarios
        ],
    )
    for name, rates, _ in scenarios[: 1 if done.before == done.after else 2]:
        print(f"Hit rate, {name.split(' for ')[0]}: {rates.source}.")
        if rates.by_policy:
            figures = ", ".join(f"{key} {value:.1%}" for key, value in rates.by_policy.items())
            print(f"  by policy: {figures}; no policy passes belady.")
    for sentence in (*done.assumed, *done.notes):
        print(sentence)
    if left is not None:
        print(
            f"The host that plans has {size(left.free_bytes)} of memory left ({left.limited_by}); "
            "to plan with it, give that as --ram."
        )


def _where(done: Plan) -> str:
    if done.all_resident:
        return "all of them in slots"
    kept = "" if done.bits is None else f"stored at {done.bits} bits; "
    if done.fits_in_ram is None:
        return kept + "wait in host memory, if it is large enough (--ram)"
    if done.fits_in_ram:
        return kept + "fit in host memory"
    return kept + "do not fit in host memory: misses go to the disk"


def _range(low: float, high: float, percent: bool = False) -> str:
    ends = [
        f"{one:.1%}" if percent else f"{one:,.0f}" if one >= 100 else f"{one:.3g}"
        for one in (low, high)
    ]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
