"""`melinoe predictor fit`: learn from a trace which experts a prompt will need."""

from pathlib import Path
from typing import Annotated

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option


def fit_command(
    trace: Annotated[Path, typer.Argument(help="A trace file that `melinoe trace` wrote.")],
    out: options.Out,
    slots: Annotated[
        int | None, option("Judge by so many slots in each layer. Default: a quarter.", min=1)
    ] = None,
    model: Annotated[str | None, option("The traced model. Default: as the trace says.")] = None,
    seed: Annotated[int, option("Seed of the folds and of the start.", **options.SEEDS)] = 0,
    as_json: options.AsJson = False,
) -> None:
    """Fit a predictor, and compare it with rivals that cost nothing."""
    from melinoe.cache.trace import Trace
    from melinoe.checkpoint import check_output
    from melinoe.config import QUARTER, experts_in_share
    from melinoe.errors import BudgetError
    from melinoe.predictor import compare, fit, load_prompts
    from melinoe.predictor.model import token_embeddings

    output.quiet()
    check_output(out)
    loaded = Trace.load(trace)
    prompts = load_prompts(trace, loaded)
    size = slots or experts_in_share(QUARTER, loaded.num_experts)
    if size > loaded.num_experts:
        raise BudgetError(
            f"{size} slots cannot be in layers of {loaded.num_experts} experts; choose from 1 to "
            f"{loaded.num_experts}"
        )
    backbone, _ = models.open_backbone(loaded, trace, model)
    embeddings = token_embeddings(backbone)
    comparison = compare(loaded, prompts, embeddings, size, seed=seed)
    predictor = fit(loaded, prompts, embeddings, size, seed=seed)
    predictor.comparison = comparison.to_record(model or loaded.model)
    predictor.save(out)
    if as_json:
        output.show_json(predictor.comparison)
    else:
        rows = []
        for name, recall in (*comparison.recall.items(), ("ceiling", comparison.ceiling)):
            loads = comparison.transfers.get(name)
            row = {"strategy": name, "recall": recall.mean, "low": recall.low, "high": recall.high}
            rows.append(row | {"loads per token": None if loads is None else loads.mean})
        output.show_table(f"experts of the completion, {size} slots a layer", rows)
    output.say(
        f"wrote {out}; the best guess here: {comparison.winner}; what to load ahead of need: "
        f"{comparison.prefetch}"
        + (" (its own loads cost what it saves)" if comparison.prefetch == "none" else "")
    )
