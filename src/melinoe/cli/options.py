"""
Options that several commands share, each written once.

An option without a panel is an everyday one; see `melinoe.cli.command`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli.command import option
from melinoe.config import STORES, policies, setting
from melinoe.config.setting import check_choices
from melinoe.errors import BudgetError

DATA = "Data"
MEMORY = "Experts in memory"
MISSES = "Misses and choices"
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


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """
    How a command runs a model.

    Raises:
        BudgetError: a word that is none of those a setting may have.
    """

    gpu_memory: str | None = setting(
        None, "memory on the GPU for everything, as in 8GiB; with the fast engine"
    )
    device: str = setting("auto", "where the model runs: auto, cpu or cuda")
    dtype: str = setting("auto", "type of the weights: auto (as stored), float32 or bfloat16")
    slots: int | None = setting(
        None, "experts kept resident in each layer. Default: a quarter of them"
    )
    expert_memory: str | None = setting(
        None, "memory for the resident experts of all layers, as in 8GiB; instead of --slots"
    )
    allocate_from: str | None = setting(
        None,
        "share out the slots by what this trace of the model says each layer would miss: as many "
        "in all as --slots or --expert-memory gives",
    )
    policy: str = setting(
        "lru",
        "which resident expert is evicted first: lru, lfu, lfru, score, or a policy of an "
        "installed package",
        choices=policies,
    )
    store: str = setting(
        "auto",
        "where the experts that are not resident wait; auto: pinned memory for a GPU if they fit, "
        "else disk",
        choices=STORES,
    )
    context: int | None = setting(
        None, "longest text that --gpu-memory is to hold. Default: 2048", unit="tokens"
    )
    miss: str = setting(
        "wait",
        "on a miss: wait until the expert is loaded; cpu: compute it on the CPU, so that only a "
        "prefetch loads; split: whichever is faster by costs measured at the start",
    )
    miss_threads: int | None = setting(
        None, "CPU threads that compute misses. Default: the fewest that are fast"
    )
    choice: str = setting(
        "exact",
        "let tokens prefer resident experts: exact (no) or cache-prior. Changes what the model "
        "writes",
    )
    choice_strength: float = setting(0.1, "how strongly cache-prior prefers them (its lambda)")
    choice_keep: int = setting(1, "first choices of the router that cache-prior never changes")
    engine: str = setting(
        "reference",
        "reference runs everywhere; fast needs a GPU and pinned memory for all experts; auto: "
        "fast where it can run",
    )
    format: str | None = setting(
        None,
        "store experts as int8, int4, mxfp4 or fp8. Default: as the checkpoint has them. Packing "
        "changes what the model writes",
    )
    compile: bool = setting(
        False,
        "compile the decode step of the fast engine: the first tokens take minutes, and the last "
        "bits of logits change",
    )

    def __post_init__(self) -> None:
        check_choices(self, BudgetError)


_PANELS: dict[str | None, tuple[str, ...]] = {
    None: ("gpu_memory", "device"),
    MEMORY: ("slots", "expert_memory", "allocate_from", "policy", "store", "context"),
    MISSES: ("miss", "miss_threads", "choice", "choice_strength", "choice_keep"),
    ENGINE: ("engine", "format", "compile", "dtype"),
}


def model_panels(*without: str) -> Mapping[str | None, tuple[str, ...]]:
    """Give the panels of `ModelOptions`, without the options named."""
    return {
        panel: tuple(name for name in names if name not in without)
        for panel, names in _PANELS.items()
    }
