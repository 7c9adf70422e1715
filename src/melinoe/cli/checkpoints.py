"""Commands that write a checkpoint or its card: `pack`, `prune`, `merge`, `card`, and the demo."""

import json
from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option


def pack(
    model: options.Model,
    out: options.Out,
    format: Annotated[
        str,
        option(
            "int8, int4, mxfp4 or fp8; int4-g64 and int4-g128 share a scale by 64 and 128 weights "
            "instead of 32. plain: packed weights as they mean, for training and other engines."
        ),
    ] = "int4",
) -> None:
    """Write a checkpoint with its experts packed, which takes less disk and memory."""
    from melinoe.checkpoint.pack import pack

    output.quiet()
    off = pack(models.resolve(model), format, out)
    output.say(f"wrote {out}{_off(off)}")


def prune(
    model: options.Model,
    data: options.Examples,
    out: options.Out,
    keep: Annotated[int | None, option("Experts of each layer that stay.", min=1)] = None,
    max_ppl_increase: Annotated[
        float | None,
        option(
            "Keep the fewest with which perplexity grows by so many per cent at most, in place of "
            "--keep.",
            min=0,
        ),
    ] = None,
    limit: options.Limit = None,
    columns: options.Columns = None,
    split: options.Split = "train",
    device: Annotated[str | None, option("Where to measure.")] = None,
    gpu_memory: Annotated[str | None, option("The most to take of the GPU, as in 8GiB.")] = None,
    ram: Annotated[str | None, option("The most to take of the host for experts.")] = None,
) -> None:
    """Drop the experts that examples use least: a plain checkpoint for any engine."""
    from melinoe.data import load_examples
    from melinoe.outcome import prune_by_use

    output.quiet()
    examples = load_examples(data, split=split, limit=limit, columns=columns)
    found = prune_by_use(
        models.resolve(model), examples, out, keep=keep,
        memory={"device": device, "gpu_memory": gpu_memory, "ram": ram},
        max_increase=None if max_ppl_increase is None else max_ppl_increase / 100, say=output.say,
    )  # fmt: skip
    low, high = (100 * end for end in (found.increase.low, found.increase.high))
    output.say(
        f"wrote {out} with {found.kept} of {found.before} experts a layer; perplexity "
        f"{100 * found.increase.mean:+.2f} % [{low:+.2f}, {high:+.2f}]"
    )


def merge(
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
    format: Annotated[
        str | None,
        option("Pack the merged experts, as melinoe pack does; the base may be packed itself."),
    ] = None,
) -> None:
    """Merge an adapter into its base: a plain checkpoint in the hub's layout, for any engine."""
    from melinoe.finetune.saving import merge_adapter, merge_packed

    output.quiet()
    base, off = models.resolve(base) if base is not None else None, 0.0
    if format is None:
        made = merge_adapter(adapter, out, base=base)
    else:
        made, off = merge_packed(adapter, out, format, base=base)
    output.say(f"wrote {out}{_off(off)}")
    if made.get("settings"):  # of an adapter of ours, whose melinoe.json says what a card tells
        card(out)


def _off(share: float) -> str:
    return f"; its experts are {share:.1%} off in the root mean square" if share else ""


def card(
    directory: Annotated[Path, typer.Argument(help="A checkpoint that `melinoe finetune` wrote.")],
    overwrite: Annotated[
        bool, option("Replace a README.md that melinoe did not write.", name="--overwrite")
    ] = False,
) -> None:
    """Write README.md, with a table and figures, beside a fine-tuned checkpoint's weights."""
    from melinoe.report.card import write_card

    write_card(directory, overwrite)
    output.say(f"wrote {directory}/README.md and its figures")


def demo(
    out: options.Out = Path("runs/demo"),
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune the shipped model twice, trace, predict and serve it; print a table."""
    from melinoe.checkpoint import check_output
    from melinoe.demo import DemoSettings, run

    check_output(out)
    output.quiet()
    table = run(out, DemoSettings(seed=seed), say=output.say)
    if as_json:
        lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
        output.show_json([json.loads(line) for line in lines])
    else:
        print(table)
