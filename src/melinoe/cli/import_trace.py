"""`melinoe import-trace`: traces that other tools wrote."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import output
from melinoe.cli.command import option


def command(
    file: Annotated[
        Path,
        typer.Argument(
            help="A table or arrays: .csv, .parquet, .jsonl, .npz or .npy; see docs/traces.md."
        ),
    ],
    out: Annotated[Path, option("The trace file to write (.safetensors).")],
    num_experts: Annotated[
        int | None, option("Experts of each layer, where the file does not say.", min=1)
    ] = None,
    model: Annotated[str, option("Name of the model, as people call it.")] = "",
) -> None:
    """Make a trace of what another tool recorded."""
    from melinoe.errors import OutputExistsError
    from melinoe.foreign import read_foreign

    if out.exists():
        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    trace, notes = read_foreign(file, num_experts, model)
    for note in notes:
        output.say(f"{file}: {note}")
    trace.save(out)
    output.say(
        f"{trace.num_sequences} sequences, {len(trace)} tokens, {trace.num_layers} layers of "
        f"{trace.num_experts} experts -> {out}"
    )
