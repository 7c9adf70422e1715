"""`melinoe card`: a fine-tuned checkpoint's model card, from its melinoe.json."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli.command import option


def command(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that `melinoe finetune` wrote.")],
    overwrite: Annotated[
        bool, option("Replace a README.md that melinoe did not write.", name="--overwrite")
    ] = False,
) -> None:
    """Write README.md, with a table and figures, beside a fine-tuned checkpoint's weights."""
    from melinoe.cli import output
    from melinoe.report.card import write_card

    for path in write_card(directory, overwrite):
        output.say(f"wrote {path}")
