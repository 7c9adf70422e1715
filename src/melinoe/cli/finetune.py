"""`melinoe finetune`: teach a model to prefer few experts per sequence."""

from typing import Annotated, Any

import typer

from melinoe.cli import measuring, options
from melinoe.config import FinetuneSettings, OutcomeSettings

_DEFAULT = FinetuneSettings()


def _help(name: str) -> str:
    field = FinetuneSettings.__dataclass_fields__[name]
    unit, choices = field.metadata["unit"], field.metadata["choices"]
    text = field.metadata["help"]
    if choices:
        text += f" ({' | '.join(choices)})"
    return f"{text} [{unit}]" if unit else text


def _option(name: str) -> Any:
    return typer.Option(help=_help(name))


def command(
    model: options.Model,
    data: Annotated[str, typer.Option(help="Examples: a JSONL file, a directory, a hub data set.")],
    out: options.Out,
    control: Annotated[
        bool, typer.Option(help="The NLL-only control: same data, order, steps; no cache losses.")
    ] = False,
    limit: options.Limit = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out examples, measured before and after.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    eval_split: Annotated[str, typer.Option(help="The same for --eval-data.")] = "test",
    hold_out: Annotated[
        float,
        typer.Option(
            help="Share of the data kept out of training and measured on, without --eval-data.",
            min=0.0,
            max=0.5,
        ),
    ] = OutcomeSettings().held_out,
    other: Annotated[
        list[str] | None,
        typer.Option(
            help="Other texts, to measure what is lost out of domain: a file, a directory, a hub "
            "data set; may be repeated."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(help="Measure quality and locality before and after, for melinoe.json."),
    ] = True,
    capacity: Annotated[float, _option("capacity")] = _DEFAULT.capacity,
    train: Annotated[str, _option("train")] = _DEFAULT.train,
    lambda_cache: Annotated[float, _option("lambda_cache")] = _DEFAULT.lambda_cache,
    lambda_rank: Annotated[float, _option("lambda_rank")] = _DEFAULT.lambda_rank,
    gamma: Annotated[float, _option("gamma")] = _DEFAULT.gamma,
    rho: Annotated[float, _option("rho")] = _DEFAULT.rho,
    cache_loss: Annotated[str, _option("cache_loss")] = _DEFAULT.cache_loss,
    cache_gradient: Annotated[bool, _option("cache_gradient")] = _DEFAULT.cache_gradient,
    anchor: Annotated[str, _option("anchor")] = _DEFAULT.anchor,
    rank_reduce: Annotated[str, _option("rank_reduce")] = _DEFAULT.rank_reduce,
    lora_rank: Annotated[int, _option("lora_rank")] = _DEFAULT.lora_rank,
    lora_alpha: Annotated[float, _option("lora_alpha")] = _DEFAULT.lora_alpha,
    learning_rate: Annotated[float, _option("learning_rate")] = _DEFAULT.learning_rate,
    lora_learning_rate: Annotated[float | None, _option("lora_learning_rate")] = None,
    steps: Annotated[int | None, _option("steps")] = _DEFAULT.steps,
    epochs: Annotated[float, _option("epochs")] = _DEFAULT.epochs,
    batch_size: Annotated[int, _option("batch_size")] = _DEFAULT.batch_size,
    gradient_accumulation: Annotated[
        int, _option("gradient_accumulation")
    ] = _DEFAULT.gradient_accumulation,
    max_length: Annotated[int, _option("max_length")] = _DEFAULT.max_length,
    warmup: Annotated[float, _option("warmup")] = _DEFAULT.warmup,
    schedule: Annotated[str, _option("schedule")] = _DEFAULT.schedule,
    weight_decay: Annotated[float, _option("weight_decay")] = _DEFAULT.weight_decay,
    max_grad_norm: Annotated[float, _option("max_grad_norm")] = _DEFAULT.max_grad_norm,
    bf16: Annotated[bool, _option("bf16")] = _DEFAULT.bf16,
    log_every: Annotated[int, _option("log_every")] = _DEFAULT.log_every,
    save: Annotated[str, _option("save")] = _DEFAULT.save,
    max_bad_steps: Annotated[int, _option("max_bad_steps")] = _DEFAULT.max_bad_steps,
    seed: Annotated[int, _option("seed")] = _DEFAULT.seed,
) -> None:
    """Fine-tune any supported MoE checkpoint so that each sequence prefers few experts."""
    given = {name: value for name, value in locals().items() if name in _FIELDS}
    settings = FinetuneSettings(**given)
    if control:
        settings = settings.control()
    from melinoe.checkpoint import check_output
    from melinoe.data import load_examples
    from melinoe.finetune import finetune

    options.quiet()
    check_output(out)
    examples = load_examples(data, split=split, limit=limit)
    # Before any training, so that bad held-out data costs no time.
    held_out = measuring.hold_out(
        data, examples, eval_data, eval_split, other or [], hold_out, limit
    )
    result = finetune(
        options.resolve(model),
        held_out.train,
        out,
        settings,
        eval_examples=held_out.examples,
        progress=lambda row: options.say(describe_row(row)),
    )
    options.say(f"wrote {result.out}")
    if measure and save == "adapter":
        options.say("an adapter alone is not measured; make a checkpoint of it with melinoe merge")
        measure = False
    measuring.finish(result.out, options.resolve(model), data, split, held_out, measure)


_FIELDS = frozenset(FinetuneSettings.__dataclass_fields__)


def describe_row(row: dict[str, Any]) -> str:
    """One log row in one line: the step, then each term."""
    terms = "  ".join(
        f"{name} {value:.4g}"
        for name, value in row.items()
        if isinstance(value, float) and name not in ("epoch",)
    )
    return f"step {row.get('step', 0)} of {row.get('steps', '?')}  {terms}"
