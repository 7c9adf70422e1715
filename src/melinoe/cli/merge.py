"""`melinoe merge`: an adapter and its base become one plain checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option


def command(
    adapter: Annotated[
        Path, typer.Argument(help="Directory of an adapter that `melinoe finetune` or PEFT wrote.")
    ],
    out: options.Out,
    base: Annotated[
        str | None,
        option(
            "The adapter's base: a directory or a name on the hub. Default: what the adapter names."
        ),
    ] = None,
) -> None:
    """Merge an adapter into its base: a plain checkpoint in the hub's layout, for any engine."""
    from melinoe.finetune.saving import merge_adapter

    output.quiet()
    made = merge_adapter(adapter, out, base=models.resolve(base) if base is not None else None)
    output.say(f"wrote {out}")
    if made.get("settings"):  # of an adapter of ours, whose melinoe.json says what a card tells
        from melinoe.report.card import write_card

        write_card(out)
        output.say(f"wrote {out}/README.md and its figures")
