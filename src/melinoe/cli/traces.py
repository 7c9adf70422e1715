"""Commands that make traces and learn from them: `trace`, `import-trace`, `predictor fit`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output
from melinoe.cli.command import option


@options.serving()
def trace(
    model: options.Model,
    data: options.Prompts,
    out: options.TraceOut,
    limit: options.Limit = 64,
    max_new_tokens: options.NewTokens = 64,
    raw: options.Raw = False,
    columns: options.Columns = None,
    split: options.Split = "test",
    *,
    given: dict[str, Any],
) -> None:
    """Generate from prompts, and record which experts every token chose."""
    from melinoe.data import load_examples
    from melinoe.generate import trace_prompts
    from melinoe.predictor import save_prompts

    _check_new(out)
    examples = load_examples(data, split=split, limit=limit, columns=columns, prompts=True)
    loaded, handle, tokenizer = models.open_model(model, given)
    prompts = models.prompt_ids(examples, tokenizer, raw)
    trace = trace_prompts(loaded, handle, tokenizer, prompts, max_new_tokens, progress=output.say)
    trace.save(out)
    output.say(f"prompts -> {save_prompts(out, trace.fingerprint, prompts)}")
    output.say(f"{trace.num_sequences} prompts, {len(trace)} tokens -> {out}")


def import_trace(
    file: Annotated[
        Path,
        typer.Argument(
            help="A table or arrays: .csv, .parquet, .jsonl, .npz or .npy; see docs/traces.md."
        ),
    ],
    out: options.TraceOut,
    num_experts: Annotated[
        int | None, option("Experts of each layer, where the file does not say.", min=1)
    ] = None,
    model: Annotated[str, option("Name of the model, as people call it.")] = "",
) -> None:
    """Make a trace of what another tool recorded."""
    from melinoe.foreign import read_foreign

    _check_new(out)
    trace, notes = read_foreign(file, num_experts, model)
    for note in notes:
        output.say(f"{file}: {note}")
    trace.save(out)
    output.say(
        f"{trace.num_sequences} sequences, {len(trace)} tokens, {trace.num_layers} layers of "
        f"{trace.num_experts} experts -> {out}"
    )


def _check_new(out: Path) -> None:
    if out.exists():
        from melinoe.errors import OutputExistsError

        raise OutputExistsError(f"{out} exists; name another file, or remove it first")


def fit(
    trace: options.TraceFile,
    out: options.Out,
    slots: Annotated[
        int | None, option("Judge by so many slots in each layer. Default: a quarter.", min=1)
    ] = None,
    model: Annotated[str | None, option("The traced model. Default: as the trace says.")] = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Fit a predictor, and compare it with rivals that cost nothing."""
    from melinoe.cache.trace import Trace
    from melinoe.checkpoint import check_output
    from melinoe.config import QUARTER, experts_in_share
    from melinoe.predictor import compare, load_prompts
    from melinoe.predictor import fit as fit_predictor
    from melinoe.predictor.model import token_embeddings

    output.quiet()
    check_output(out)
    loaded = Trace.load(trace)
    prompts = load_prompts(trace, loaded)
    size = slots or experts_in_share(QUARTER, loaded.num_experts)
    models.check_slots(size, loaded.num_experts)
    backbone, _ = models.open_backbone(loaded, trace, model)
    embeddings = token_embeddings(backbone)
    comparison = compare(loaded, prompts, embeddings, size, seed=seed)
    predictor = fit_predictor(loaded, prompts, embeddings, size, seed=seed)
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
    why = " (its own loads cost what it saves)" if comparison.prefetch == "none" else ""
    output.say(
        f"wrote {out}; the best guess here: {comparison.winner}; what to load ahead of need: "
        f"{comparison.prefetch}{why}"
    )
