"""`melinoe predictor`: learn which experts a prompt will need, and see what a prior learned."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import options, output
from melinoe.cli.command import Command, option
from melinoe.lock import held, holding

app = typer.Typer(
    help="Learn which experts a prompt will need, from a trace or from what is served.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
PriorFile = Annotated[Path, typer.Argument(help="A file that `melinoe generate --prior` keeps.")]


@app.command("fit", cls=Command)
@holding("out")
def fit_command(
    trace: Annotated[Path, typer.Argument(help="A trace file that `melinoe trace` wrote.")],
    out: options.Out,
    slots: Annotated[
        int | None,
        option("Judge by this many slots in each layer. Default: a quarter of the experts.", min=1),
    ] = None,
    model: Annotated[
        str | None,
        option("The traced model; `tiny` is the one that ships. Default: as the trace says."),
    ] = None,
    data: Annotated[
        str | None, option("The prompts that were traced. Default: those beside the trace.")
    ] = None,
    raw: options.Raw = False,
    encoder: Annotated[
        str,
        option(
            "What reads the prompts: embeddings (the model's own), or the name of a "
            "sentence-transformers model, such as BAAI/bge-base-en-v1.5."
        ),
    ] = "embeddings",
    seed: Annotated[int, option("Seed of the folds and of the start.")] = 0,
    as_json: options.AsJson = False,
    columns: options.Columns = None,
    split: options.Split = "test",
) -> None:
    """Fit a predictor, and compare it with rivals that cost nothing."""
    from melinoe.cache.trace import Trace
    from melinoe.checkpoint import check_output
    from melinoe.cli.models import open_backbone, prompt_ids
    from melinoe.config import ServeSettings, experts_in_share
    from melinoe.data import load_examples
    from melinoe.errors import BudgetError
    from melinoe.predictor import EmbeddingEncoder, SentenceEncoder, compare, fit, load_prompts
    from melinoe.predictor.encoders import EMBEDDINGS, token_embeddings

    if columns is not None and data is None:
        raise typer.BadParameter("--columns go with --data", param_hint="--columns")
    output.quiet()
    check_output(out)
    loaded = Trace.load(trace)
    prompts = load_prompts(trace, loaded) if data is None else None
    size = slots or experts_in_share(ServeSettings().slots, loaded.num_experts)
    if size > loaded.num_experts:
        raise BudgetError(
            f"{size} slots cannot be in layers of {loaded.num_experts} experts; choose from 1 to "
            f"{loaded.num_experts}"
        )
    backbone, tokenizer = open_backbone(loaded, trace, model)
    name = model or loaded.model
    if prompts is None:
        assert data is not None
        examples = load_examples(
            data, split=split, limit=loaded.num_sequences, columns=columns, prompts=True
        )
        prompts = prompt_ids(examples, tokenizer, raw)
    reader = (
        EmbeddingEncoder(token_embeddings(backbone))
        if encoder == EMBEDDINGS
        else SentenceEncoder.load(encoder, tokenizer)
    )
    comparison = compare(loaded, prompts, reader, size, seed=seed)
    predictor = fit(loaded, prompts, reader, size, seed=seed)
    predictor.comparison = comparison.to_record(name)
    predictor.save(out)
    rows = [
        {
            "strategy": strategy,
            "recall": value.mean,
            "low": value.low,
            "high": value.high,
            "loads per token": loads.mean
            if (loads := comparison.transfers.get(strategy)) is not None
            else None,
        }
        for strategy, value in (*comparison.recall.items(), ("ceiling", comparison.ceiling))
    ]
    if as_json:
        output.show_json(comparison.to_record(name))
    else:
        output.show_table(f"experts of the completion, {size} slots a layer", rows)
    output.say(
        f"wrote {out}; the best guess here: {comparison.winner}; what to load ahead of need: "
        f"{comparison.prefetch}"
        + (" (its own loads cost what it saves)" if comparison.prefetch == "none" else "")
    )


@app.command("prior", cls=Command)
def prior_command(prior: PriorFile, as_json: options.AsJson = False) -> None:
    """Show whose requests a prior has learned from, the latest first."""
    from melinoe.predictor.prior import HALF_LIFE, Prior

    found = Prior.load(prior)
    rows = [{"user": key, "requests": found.requests(key)} for key in found.keys()[::-1]]
    if as_json:
        output.show_json({"fingerprint": found.fingerprint, "users": rows})
    elif rows:
        title = f"half-life {HALF_LIFE:g} requests"
        output.show_table(title, [{**row, "user": row["user"] or "(all)"} for row in rows])
    else:
        output.say(f"{prior} has learned nothing yet")


@app.command("reset", cls=Command)
def reset_command(
    prior: PriorFile,
    user: Annotated[str | None, option("Forget this user alone. Default: everybody.")] = None,
) -> None:
    """Forget what a prior has learned."""
    from melinoe.predictor import Prior

    Prior.load(prior)  # what is wrong with it shows before it is waited for
    with held(prior, wait=True):
        _reset(prior, user)


def _reset(prior: Path, user: str | None) -> None:
    from melinoe.errors import DataError
    from melinoe.predictor import Prior

    found = Prior.load(prior)
    known = found.keys()
    if user is not None and user not in known:
        raise DataError(
            f"{prior} knows nothing of user {user!r}; see `melinoe predictor prior {prior}` for "
            "those it knows"
        )
    found.reset(user)
    found.save(prior)
    output.say(f"forgot {len(known) - len(found.keys())} of {len(known)} users")
