"""
Options that several commands share, each written once.

An option without a panel is an everyday one; see `melinoe.cli.command`.
"""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli.command import option

DATA = "Data"
MEMORY = "Experts in memory"
MISSES = "Misses"
CHOICES = "Choice of experts"
AHEAD = "Prefetch"
ENGINE = "Engine"

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint directory or a name on the hub; `tiny` is the model that ships."
    ),
]
Prompts = Annotated[
    str, option("Prompts: a file, a directory of files, or a hub data set.", name="--data")
]
Raw = Annotated[
    bool, option("Leave out the chat template that the tokenizer brings.", name="--raw")
]
NewTokens = Annotated[int, option("Generate at most this many tokens.", min=1)]
AsJson = Annotated[bool, option("Print JSON instead of text and tables.", name="--json")]
Out = Annotated[Path, option("The directory to write; new or empty.")]
RecordsOut = Annotated[
    Path | None, option("Append the records to this .jsonl file, for `melinoe report`.")
]
Split = Annotated[str, option("Split of a hub data set.", DATA)]
Limit = Annotated[int | None, option("Use only the first examples.", min=1)]
Columns = Annotated[
    str | None,
    option(
        "Name the columns of --data, as in prompt=question,completion=answer. Default: the "
        "names that docs/data.md lists.",
        DATA,
    ),
]
Other = Annotated[
    list[str] | None,
    option(
        "Also measure on this text of another kind: a file, a directory, a hub data set. "
        "Repeatable.",
        DATA,
    ),
]


AllocateFrom = Annotated[
    Path | None,
    option(
        "Share out the slots by what this trace of the model says each layer would miss: as many "
        "in all as --slots or --expert-memory gives.",
        MEMORY,
    ),
]
Choice = Annotated[
    str,
    option(
        "Let tokens prefer resident experts: exact (no) or cache-prior. Changes what the model "
        "writes.",
        CHOICES,
    ),
]
ChoiceStrength = Annotated[
    float, option("How strongly cache-prior prefers them (its lambda).", CHOICES, min=0.0)
]
ChoiceKeep = Annotated[
    int, option("First choices of the router that cache-prior never changes.", CHOICES, min=0)
]

# Names of `melinoe.engine.options.Options` by panel; without one, the everyday ones.
SERVING: dict[str | None, tuple[str, ...]] = {
    None: ("device", "gpu_memory", "ram"),
    MEMORY: ("slots", "expert_memory", "policy", "store", "batch", "context"),
    MISSES: ("miss", "miss_threads"),
    ENGINE: ("engine", "format", "compile", "dtype"),
}
