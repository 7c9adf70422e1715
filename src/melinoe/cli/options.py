"""Options that several commands share, each said once."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="Checkpoint directory or hub name; `tiny` is the model that ships.")
]
Slots = Annotated[
    int | None,
    typer.Option(help="Experts resident in each layer. Default: a quarter of them.", min=1),
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(help="Memory for resident experts of all layers, as in 8GiB; instead of --slots."),
]
Policy = Annotated[
    str,
    typer.Option(help="Who leaves: lru, lfu, lfru, score, or a policy of an installed package."),
]
StoreKind = Annotated[
    str,
    typer.Option(
        help="Where the other experts live: ram, pinned, disk; auto: pinned for a GPU if they fit, "
        "else disk."
    ),
]
Miss = Annotated[
    str,
    typer.Option(
        help="On a miss: wait, until the expert is there; cpu, compute it where it is, so that "
        "slots hold only what a prefetch brings; split, by costs measured at the start. With the "
        "reference engine."
    ),
]
MissThreads = Annotated[
    int | None,
    typer.Option(help="Threads of the CPU for that. Default: the fewest that are fast.", min=1),
]
Choice = Annotated[
    str,
    typer.Option(
        help="Let decoding tokens prefer resident experts: exact (no) or cache-prior. "
        "Changes what the model says."
    ),
]
ChoiceStrength = Annotated[float, typer.Option(help="How much: lambda of cache-prior.", min=0.0)]
ChoiceKeep = Annotated[
    int, typer.Option(help="The router's first so many choices of a token always stay.", min=0)
]
Engine = Annotated[
    str,
    typer.Option(
        help="reference: runs everywhere; fast: needs a GPU and pinned memory for all experts, and "
        "never asks the host in a decode step; auto: fast where it can run."
    ),
]
Compression = Annotated[
    str | None,
    typer.Option(
        help="With the fast engine: keep experts as int8 or int4 codes. Changes what the model "
        "says."
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="With the fast engine: compile the decode step that CUDA graphs capture. The first "
        "tokens take as long as compiling does; the last bits of logits change.",
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        help="With the fast engine, instead of --slots: a budget for everything on the GPU, as in "
        "8GiB."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens of a text that --gpu-memory is to hold. Default: 2048.", min=1),
]
Device = Annotated[str, typer.Option(help="Where the model runs: auto, cpu, cuda.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Out = Annotated[Path, typer.Option(help="Where to write; must not exist, or be empty.")]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate for each prompt.", min=1)]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Of --data: what its columns are, as in prompt=question,completion=answer. Default: "
        "the names of TRL's forms, and some others."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Use only the first examples.", min=1)]


def resolve(model: str) -> str:
    """The path behind a model's name: `tiny` is the shipped one, all else is taken as given."""
    if model == "tiny":
        from melinoe.shipped import TINY_OLMOE

        return str(TINY_OLMOE)
    return model


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet() -> None:
    """Silence the libraries' own progress bars and notices; ours go to stderr."""
    import transformers

    transformers.logging.set_verbosity_error()
    if not is_main_process():
        logging.getLogger("melinoe").setLevel(logging.ERROR)  # the first process says it
    transformers.logging.disable_progress_bar()


def is_main_process() -> bool:
    """Whether this is the only process of a run, or the first of several that were launched."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Progress and notes, to stderr, so that stdout holds data alone; of one process only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def show_json(value: Any) -> None:
    """JSON to stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def show_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows of equal keys as a table on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold")
    for name in rows[0]:
        # Fold, or a narrow terminal would cut numbers; Text, or brackets in a path would be markup.
        justify: Any = "left" if _is_text(rows, name) else "right"
        table.add_column(name.replace("_", " "), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    Console().print(table)


def _is_text(rows: list[dict[str, Any]], name: str) -> bool:
    return any(isinstance(row[name], str) for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def choice_of(kind: str, strength: float, keep: int) -> Any:
    """What --choice and its companions ask for; to be read before a model is."""
    from melinoe.moe.choice import ChoiceSettings

    return ChoiceSettings(kind, strength if kind != "exact" else 0.0, keep)


def check_misses(named: list[str]) -> None:
    """
    Refuse a way to handle misses that there is none of.

    Raises:
        BadParameter: an unknown name.
    """
    from melinoe.cache.misses import MISSES

    if unknown := [one for one in named if one not in MISSES]:
        raise typer.BadParameter(
            f"{unknown[0]!r} is not one of {', '.join(MISSES)}", param_hint="--miss"
        )


def open_model(
    model: str,
    device: str,
    dtype: str,
    slots: int | None,
    expert_memory: str | None,
    policy: str,
    store: str,
    engine: str = "reference",
    miss: str = "wait",
    allocate_from: Path | None = None,
    **more: Any,
) -> tuple[Any, Any, Any]:
    """A model with few resident experts, its handle and its tokenizer; a quarter if not told."""
    check_misses([miss])
    if allocate_from is not None and more.get("gpu_memory") is not None:
        raise typer.BadParameter(
            "slots are split by --slots or --expert-memory; leave --gpu-memory out",
            param_hint="--allocate-from",
        )
    import torch

    from melinoe.checkpoint import describe, load_tokenizer
    from melinoe.config import ServeSettings, experts_in_share
    from melinoe.engine.choose import load

    wanted = getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise typer.BadParameter(
            f"{dtype!r} is not auto, float32 or bfloat16", param_hint="--dtype"
        )
    quiet()
    path = resolve(model)
    if slots is None and expert_memory is None and more.get("gpu_memory") is None:
        about = describe(path)
        slots = experts_in_share(ServeSettings().slots, about.num_experts)
    split = None
    if allocate_from is not None:
        from melinoe.cli.allocating import check_fingerprint, slots_from

        split = slots_from(allocate_from, path, slots, expert_memory, policy)
    loaded, handle = load(
        path,
        device=resolve_device(device),
        dtype=dtype,
        slots=split or slots,
        expert_memory=None if split else expert_memory,
        policy=policy,
        engine=engine,
        # Only the reference engine has a choice of stores; "auto" is no choice.
        store=None if engine != "reference" and store == "auto" else store,
        miss=miss,
        **more,
    )
    if allocate_from is not None:
        check_fingerprint(allocate_from, loaded)
    if miss == "cpu":
        say("misses are computed on the CPU; slots hold what a prefetch brings, nothing else")
    return loaded, handle, load_tokenizer(path, loaded.config)
