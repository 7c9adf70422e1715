"""`melinoe import-trace`: traces and statistics that other tools wrote."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import output
from melinoe.cli.command import one_of, option


def command(
    file: Annotated[
        Path,
        typer.Argument(
            help="A table or arrays (.csv, .parquet, .jsonl, .npz, .npy; see docs/traces.md), "
            "SGLang's record (.pt), or llama.cpp's importance matrix (.gguf)."
        ),
    ],
    out: Annotated[Path, option("The file to write: a trace, or statistics (.json).")],
    format: Annotated[
        str, option("What wrote the file: table, sglang, llama.cpp; auto: by its ending.")
    ] = "auto",
    statistics: Annotated[
        bool, option("Write how often each expert was chosen, without the order.")
    ] = False,
    num_experts: Annotated[
        int | None, option("Experts of each layer, where the file does not say.", min=1)
    ] = None,
    model: Annotated[str, option("Name of the model, as people call it.")] = "",
) -> None:
    """Make a trace, or statistics of use, from what another tool recorded."""
    from melinoe.cache.statistics import save_statistics
    from melinoe.errors import OutputExistsError, TraceError
    from melinoe.foreign import FORMATS, read_foreign

    one_of(format, FORMATS, "--format")
    if out.exists():
        raise OutputExistsError(f"{out} exists; name another file, or remove it first")
    found = read_foreign(file, format, num_experts=num_experts, model=model, statistics=statistics)
    layers, experts = found.counts.shape
    for note in found.notes:
        output.say(f"{file}: {note}")
    about = f"{layers} layers of {experts} experts -> {out}"
    if statistics:
        save_statistics(out, found.counts, model=model, note=f"imported from {file.name}")
        output.say(f"statistics of {about}")
        return
    if found.trace is None:
        raise TraceError(
            f"{file} counts how often each expert was used, but not in which order, so it is no "
            "trace; import it with --statistics, for the policy static and --prefetch popularity"
        )
    found.trace.save(out)
    output.say(f"{found.trace.num_sequences} sequences, {len(found.trace)} tokens, {about}")
