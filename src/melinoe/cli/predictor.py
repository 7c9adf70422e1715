"""`melinoe predictor`: learn which experts a prompt will need, and whether learning pays."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options

app = typer.Typer(
    help="Learn from a trace which experts a prompt will need.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Keeps `fit` a subcommand while it is the only one."""


@app.command("fit")
def fit_command(
    trace: Annotated[Path, typer.Argument(help="A trace file written by `melinoe trace`.")],
    model: Annotated[str, typer.Option(help="The traced model; `tiny` is the one that ships.")],
    data: Annotated[str, typer.Option(help="The prompts that were traced.")],
    out: options.Out,
    slots: options.Slots = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the split and the start.")] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Fit a predictor, and compare it with rivals that cost nothing."""
    from melinoe.cache.trace import Trace
    from melinoe.checkpoint import check_output, load_backbone, load_tokenizer, open_checkpoint
    from melinoe.config import ServeSettings, experts_in_share
    from melinoe.data import encode_prompt, load_examples
    from melinoe.errors import TraceError
    from melinoe.moe.routing import fingerprint
    from melinoe.predictor import compare, fit

    options.quiet()
    check_output(out)
    loaded = Trace.load(trace)
    size = slots or experts_in_share(ServeSettings().slots, loaded.num_experts)
    with open_checkpoint(options.resolve(model)) as checkpoint:
        backbone = load_backbone(checkpoint)
        tokenizer = load_tokenizer(options.resolve(model), backbone.config)
    if (found := fingerprint(backbone)) != loaded.fingerprint:
        raise TraceError(
            f"{trace} is of another model ({loaded.fingerprint[:12]}) than {model} ({found[:12]}); "
            "name the model that was traced, or trace this one"
        )
    examples = load_examples(data, split=split, limit=loaded.num_sequences)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    embeddings = backbone.get_input_embeddings().weight
    comparison = compare(loaded, prompts, embeddings, size, seed=seed)
    predictor = fit(loaded, prompts, embeddings, size, seed=seed)
    predictor.comparison = comparison.to_record(model)
    predictor.save(out)
    rows = [
        {"strategy": name, "recall": value.mean, "low": value.low, "high": value.high}
        for name, value in comparison.recall.items()
    ]
    if as_json:
        options.show_json(comparison.to_record(model))
    else:
        options.show_table(f"recall of the experts used, {size} slots a layer", rows)
    options.say(f"wrote {out}; the better choice here: {comparison.winner}")
