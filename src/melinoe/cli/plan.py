"""`melinoe plan`: will a model fit, how fast can it be, and what would bound it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint directory, config.json, or hub name (only the config is fetched); "
            "`tiny` is the model that ships."
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Of the device, as in 8GiB. Default: all of --card's.")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="A card by name: h100, rtx4090, l4, ...; see --list.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="Of the host, as in 32GiB. Default: enough for all experts.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(help="Host to device: 25GB/s or pcie4x16, ... Default: the card's."),
    ] = None,
    link_latency: Annotated[str, typer.Option(help="Of each transfer, as in 10us.")] = "0us",
    device_bandwidth: Annotated[
        str | None, typer.Option(help="Of the device's memory, as in 1TB/s. Default: the card's.")
    ] = None,
    dram: Annotated[
        str | None, typer.Option(help="Bandwidth of host memory: 70GB/s, or ddr5-2ch, ...")
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(help="Where experts are that RAM cannot hold: 7GB/s or nvme4, ..."),
    ] = None,
    reserve: Annotated[
        str | None,
        typer.Option(help="Device memory kept free. Default: a tenth of it, at most 1GiB."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Take hit rates from this trace of the model.")
    ] = None,
    tuned_trace: Annotated[
        Path | None, typer.Option(help="And those after fine-tuning from this one.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.", min=1)] = 4096,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.", min=1)] = 1,
    bits: Annotated[
        int | None,
        typer.Option(help="Of a stored weight: 16, 8 or 4. Default: as the config says."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine's memory, disk and link, use them.")
    ] = False,
    limits: Annotated[
        bool,
        typer.Option(
            "--limits",
            help="Instead: the table of what no engine can pass, for MODEL or the four that ship, "
            "over --link (pcie5x16) on --card (h100).",
        ),
    ] = False,
    show_list: Annotated[
        bool, typer.Option("--list", help="Instead: the cards and links known by name.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --limits: also write the record to this .json file.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Plan a model on a machine from its config alone: what fits, tokens a second, bottleneck."""
    if show_list:
        _show_known(as_json)
        return
    if limits:
        _show_limits(model, link, card, out, as_json)
        return
    if out is not None:
        raise typer.BadParameter("only --limits writes a record", param_hint="--out")
    measured = _measure(model) if measure else None
    if model is None:
        if measured is None:
            raise typer.BadParameter(
                "name a model, or use --measure, --limits or --list alone", param_hint="MODEL"
            )
        _show_measured(measured, as_json)
        return
    from melinoe.cache.trace import Trace
    from melinoe.cli.plan_text import show
    from melinoe.host_memory import host_memory
    from melinoe.plan.planner import plan
    from melinoe.plan.units import parse_seconds

    options.quiet()
    done = plan(
        options.resolve(model),
        gpu_memory=gpu_memory,
        card=card,
        ram=ram,
        link=link,
        device_bandwidth=device_bandwidth,
        dram=dram,
        disk=disk,
        reserve=reserve,
        context=context,
        batch=batch,
        bits=bits,
        latency_s=parse_seconds(link_latency),
        trace=None if trace is None else Trace.load(trace),
        tuned_trace=None if tuned_trace is None else Trace.load(tuned_trace),
        measured=measured,
    )
    if as_json:
        left = host_memory()
        host = None if left is None else left._asdict()
        options.show_json(done.to_dict() | {"host_memory_here": host})
    else:
        show(model, done)


def _measure(model: str | None) -> dict[str, float]:
    """This machine's own figures; the disk is the one that the model is on, if it is here."""
    from melinoe.plan.measuring import measure

    options.say("timing this machine's memory, disk and link")
    place = Path(options.resolve(model)).expanduser() if model else None
    return measure(place if place is not None and place.is_dir() else None)


def _show_measured(measured: dict[str, float], as_json: bool) -> None:
    from melinoe.plan.units import format_bandwidth

    if as_json:
        options.show_json(
            {f"{part.replace(' ', '_')}_bytes_per_s": v for part, v in measured.items()}
        )
        return
    options.show_table(
        "This machine (disk: one run; the rest: best of several)",
        [{"part": part, "bandwidth": format_bandwidth(v)} for part, v in measured.items()],
    )


def _show_known(as_json: bool) -> None:
    from melinoe.plan.hardware import known

    if as_json:
        options.show_json(known())
        return
    options.show_table(
        "Cards (--card)",
        [
            {
                "card": ", ".join(one["names"]),
                "GiB": one["memory_gib"],
                "GB/s": f"{one['bandwidth_gb_s']:,}",
                "link": one["link"],
                "source": one["source"],
            }
            for one in known()["cards"]
        ],
    )
    for title, key in (("Links (--link)", "links"), ("Host memory (--dram)", "dram"),
                       ("Disks (--disk)", "disks")):  # fmt: skip
        options.show_table(
            title,
            [
                {"name": one["names"][0], "GB/s": f"{one['gb_s']:g}", "source": one["source"]}
                for one in known()[key]
            ],
        )


def _show_limits(
    model: str | None, link: str | None, card: str | None, out: Path | None, as_json: bool
) -> None:
    from melinoe.plan.limits import limits, limits_record
    from melinoe.report import render_table

    options.quiet()
    models = [options.resolve(model)] if model else []
    table = limits(models, link or "pcie5x16", card or "h100")
    record = limits_record(table)
    if out is not None:
        from melinoe.measure import write_json

        write_json(out, record)
        options.say(f"wrote {out}")
    if as_json:
        options.show_json(table)
    else:
        print(render_table([record]))
