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
    readme: Annotated[
        Path | None, option("Write the tables of this Markdown file instead of a page.")
    ] = None,
    figures: Annotated[
        Path | None, option("Write the figures into this directory instead of a page, as SVG.")
    ] = None,
    check: Annotated[
        bool, option("With --readme: write nothing, fail if it is out of date.")
    ] = False,
) -> None:
    """Write a self-contained page with tables and figures, or these by themselves."""
    from melinoe.errors import DataError
    from melinoe.report import figures_of, page_path, update_readme, write_figures, write_report

    if policy and not any(run.suffix == ".safetensors" for run in runs):
        raise typer.BadParameter(
            "a policy replays a trace (.safetensors), and none is named", param_hint="--policy"
        )
    if figures is not None and readme is not None:
        raise typer.BadParameter("--figures and --readme are two things; give one at a time")
    if figures is not None:
        written = write_figures(figures_of(_with_traces(runs, policy)), figures)
        output.say(f"{figures}: wrote {len(written)} figures")
    elif readme is None:
        page_path(out)
        write_report(_with_traces(runs, policy), out)
        output.say(f"wrote {out} and {out.with_suffix('.md')}")
    else:
        stale = update_readme(readme, list(runs), check=check)
        if check and stale:
            raise DataError(
                f"{readme} is out of date in {', '.join(stale)}; run the same without --check"
            )
        output.say(f"{readme}: {'wrote ' + ', '.join(stale) if stale else 'up to date'}")


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
            trace = Trace.load(run)
            found += trace_records(trace, label, policies or COMPILED_POLICIES, progress)
    return found
