"""`melinoe demo`: the main job on the shipped model, from text to table."""

import json
from pathlib import Path
from typing import Annotated

from melinoe.cli import options, output
from melinoe.cli.command import option


def command(
    out: options.Out = Path("runs/demo"),
    seed: Annotated[int, option("Seed of everything that is random.")] = 0,
    quick: Annotated[
        bool, option("Take a minute instead of eight, for figures that mean nothing.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune the shipped model twice, trace, predict and serve it; print a table."""
    from melinoe.checkpoint import check_output
    from melinoe.demo import run

    check_output(out)
    output.quiet()
    table = run(out, seed=seed, quick=quick, say=output.say)
    if as_json:
        lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
        output.show_json([json.loads(line) for line in lines])
    else:
        print(table)
