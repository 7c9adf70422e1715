"""Options that several commands share, each written once; without a panel, everyday ones."""
# ruff: noqa: RUF009  (a setting is a field)

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli.command import option, with_settings
from melinoe.config.setting import setting
from melinoe.engine.options import Options

DATA = "Data"
AHEAD = "Prefetch"
MACHINE = "Machine"

Model = Annotated[
    str,
    typer.Argument(
        help="A checkpoint directory or a name on the hub; `tiny` is the model that ships."
    ),
]
ModelOrConfigIfAny = Annotated[
    str | None,
    typer.Argument(help="A checkpoint directory, a config.json, a name on the hub, or `tiny`."),
]
Examples = Annotated[
    str, option("Examples: a file, a directory of files, or a hub data set.", name="--data")
]
Prompts = Annotated[
    str, option("Prompts: a file, a directory of files, or a hub data set.", name="--data")
]
Raw = Annotated[
    bool, option("Leave out the chat template that the tokenizer brings.", name="--raw")
]
Seed = Annotated[int, option("Seed of everything that is random.", min=0, max=2**32 - 1)]
TraceFile = Annotated[Path, typer.Argument(help="A trace file that `melinoe trace` wrote.")]
TraceOut = Annotated[Path, option("The trace file to write (.safetensors).")]
NewTokens = Annotated[int, option("Generate at most this many tokens.", min=1)]
Temperature = Annotated[
    float, option("Sample at this temperature. 0: take the likeliest token.", min=0)
]
ChatTemplate = Annotated[
    str | None,
    option(
        "A chat template in place of the model's own: a Jinja file, or plain, which writes "
        "`role: text`."
    ),
]
AsJson = Annotated[bool, option("Print JSON instead of text and tables.", name="--json")]
Out = Annotated[Path, option("The directory to write; new or empty.")]
RecordsOut = Annotated[
    Path | None, option("Append the records to this .jsonl file, for `melinoe report`.")
]
Split = Annotated[str, option("Split of a hub data set.", DATA)]
Limit = Annotated[int | None, option("Use only the first examples.", min=1)]
Columns = Annotated[
    str | None,
    option("Names of columns where docs/data.md has others, as prompt=q,completion=a.", DATA),
]
Other = Annotated[
    list[str] | None, option("Also measure on this text of another kind. Repeatable.", DATA)
]

PREFETCH = (
    "Load experts ahead of need: none; popularity: the most used; prefill: those the prompt used; "
    "predictor: those a fitted predictor names. Default: none, or what the files given are for."
)
Prefetch = Annotated[str | None, option(PREFETCH, AHEAD)]
Prefetches = Annotated[list[str] | None, option(f"{PREFETCH} Repeatable.", AHEAD)]
PredictorDir = Annotated[
    Path | None, option("Predictor for --prefetch predictor: a directory.", AHEAD)
]
PopularityFile = Annotated[
    Path | None, option("What --prefetch popularity counts in: a trace.", AHEAD)
]

Link = Annotated[str | None, option("Link from host to GPU, as in 25GB/s or pcie4x16.", MACHINE)]
LinkLatency = Annotated[str, option("Latency of each transfer, as in 10us.", MACHINE)]
DeviceBandwidth = Annotated[str | None, option("Of the GPU's memory, as in 1TB/s.", MACHINE)]
Dram = Annotated[str | None, option("Of the host's memory, as in 70GB/s or ddr5-2ch.", MACHINE)]


@dataclass(frozen=True, kw_only=True)
class Serving(Options):
    """Options of a model on the command line: those of `melinoe.load`, and these."""

    allocate_from: Path | None = setting(
        None,
        "share the slots of --slots out over the layers, by what each missed in this trace of the "
        "model",
    )
    choice: str = setting(
        "exact",
        "let tokens prefer resident experts: exact (no) or cache-prior, which changes what the "
        "model writes",
    )
    choice_strength: float = setting(0.1, "how strongly cache-prior prefers them (its lambda)")
    choice_keep: int = setting(1, "first choices of the router that cache-prior never changes")


def serving(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `Serving`; `models.open_model` takes its ``given``."""
    panels: dict[str | None, tuple[str, ...]] = {
        None: ("device", "gpu_memory", "ram"),
        "Experts in memory": (
            "slots", "expert_memory", "policy", "store", "batch", "context", "allocate_from",
        ),
        "Misses": ("miss",),
        "Engine": ("engine", "format", "backbone", "dtype"),
        "Choice of experts": ("choice", "choice_strength", "choice_keep"),
    }  # fmt: skip
    return with_settings(Serving, panels, **defaults)
