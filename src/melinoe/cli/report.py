"""`melinoe report`: tables and figures from measurement files and traces."""

from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import output
from melinoe.cli.command import option


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Measurement files (.json, .jsonl), directories of them, or traces (.safetensors)."
        ),
    ],
    out: Annotated[Path, option("The page to write; a .md twin stands beside it.")] = Path(
        "report.html"
    ),
    policy: Annotated[
        list[str] | None,
        option("Replay traces with this policy. Repeatable. Default: those that take seconds."),
    ] = None,
) -> None:
    """Write a self-contained page with tables and figures."""
    from melinoe.report import page_path, write_report

    if policy and not any(run.suffix == ".safetensors" for run in runs):
        raise typer.BadParameter(
            "a policy replays a trace (.safetensors), and none is named", param_hint="--policy"
        )
    page_path(out)
    write_report(_with_traces(runs, policy), out)
    output.say(f"wrote {out} and {out.with_suffix('.md')}")


def _with_traces(runs: list[Path], policies: list[str] | None) -> list[Any]:
    """Replace each trace among the files by the records that a report shows of it."""
    from melinoe.cache.simulator import COMPILED_POLICIES
    from melinoe.cache.trace import Trace
    from melinoe.measure import trace_records

    traces = [run for run in runs if run.suffix == ".safetensors"]
    alike = len({run.stem for run in traces}) < len(traces)
    found: list[Any] = [run for run in runs if run not in traces]
    for run in traces:
        label = f"{run.parent.name}/{run.stem}" if alike else run.stem
        with output.counted(f"replaying {run}") as progress:
            found += trace_records(Trace.load(run), label, policies or COMPILED_POLICIES, progress)
    return found
