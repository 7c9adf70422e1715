"""`melinoe report`: tables and figures from measurement files."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Measurement files (.json, .jsonl) or directories of them.")
    ],
    out: Annotated[
        Path, typer.Option(help="The page to write; a .md twin stands beside it.")
    ] = Path("report.html"),
    readme: Annotated[
        Path | None, typer.Option(help="Instead of a page, write the tables of this Markdown file.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="With --readme: write nothing, fail if it is out of date.")
    ] = False,
) -> None:
    """Write a self-contained page with tables and figures, or the tables of a README."""
    from melinoe.cli import options
    from melinoe.errors import DataError
    from melinoe.report import update_readme, write_report

    if readme is None:
        write_report(list(runs), out)
        options.say(f"wrote {out} and {out.with_suffix('.md')}")
        return
    stale = update_readme(readme, list(runs), check=check)
    if check and stale:
        raise DataError(
            f"{readme} is out of date in {', '.join(stale)}; run the same without --check"
        )
    options.say(f"{readme}: {'wrote ' + ', '.join(stale) if stale else 'up to date'}")
