"""`melinoe finetune`: teach a model to prefer few experts per sequence."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import measuring, options
from melinoe.cli.progress import training_progress
from melinoe.cli.settings import with_settings
from melinoe.config import CONTROL, MATCH, FinetuneSettings, OutcomeSettings
from melinoe.errors import TrainingError

_DATA, _PRICE, _RUN = "Data", "The price", "The run on its way"

PANELS = {
    "What is trained for": (
        "capacity", "lambda_cache", "cache_prior", "lambda_rank", "gamma", "cache_loss", "anchor",
    ),
    "How it is trained": (
        "train", "lora_rank", "lora_alpha", "learning_rate", "lora_learning_rate", "steps",
        "epochs", "batch_size", "gradient_accumulation", "max_length", "packing",
        "gradient_checkpointing", "bf16", "warmup", "schedule", "weight_decay", "max_grad_norm",
        "seed",
    ),
    _RUN: (
        "log_every", "eval_every", "save_every", "keep_checkpoints", "keep", "save", "report_to",
        "max_bad_steps",
    ),
    "Finer points of the objective": (
        "rho", "rank_reduce", "reference", "cache_gradient", "swap_margin", "capacity_curriculum",
        "layer_capacity", "layer_weight", "lambda_reuse", "lambda_match", "lambda_distill",
        "lambda_replay",
        "replay_loss", "replay_batch_size", "own_texts",
    ),
}  # fmt: skip


@with_settings(FinetuneSettings, PANELS)
def command(
    context: typer.Context,
    model: options.Model,
    data: Annotated[
        str,
        typer.Option(
            help="Examples: a JSONL file, a directory, a hub data set.", rich_help_panel=_DATA
        ),
    ],
    out: options.Out,
    control: Annotated[
        bool, typer.Option(help="The NLL-only control: same data, order, steps; no cache losses.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on from the newest checkpoint of an interrupted run, in OUT.checkpoints.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    split: Annotated[
        str, typer.Option(help="Split of a hub data set.", rich_help_panel=_DATA)
    ] = "train",
    limit: Annotated[
        int | None, typer.Option(help="Use only the first examples.", min=1, rich_help_panel=_DATA)
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out examples to measure.", rich_help_panel=_DATA)
    ] = None,
    eval_split: Annotated[
        str, typer.Option(help="The same for --eval-data.", rich_help_panel=_DATA)
    ] = "test",
    hold_out: Annotated[
        float,
        typer.Option(
            help="Share of the data kept out of training and measured on, without --eval-data.",
            min=0.0,
            max=0.5,
            rich_help_panel=_DATA,
        ),
    ] = OutcomeSettings().held_out,
    other: Annotated[
        list[str] | None,
        typer.Option(
            help="Other texts, to measure what is lost out of domain: a file, a directory, a hub "
            "data set; may be repeated.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    anchor_data: Annotated[
        str | None,
        typer.Option(
            help="Text of other kinds to replay, for --lambda-replay: a file, a hub data set, or "
            "own: what the base model writes from an empty prompt.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Learn from an earlier run too, at --lambda-match (10 unless you set it or "
            "--lambda-distill). control: the NLL-only run, trained first; the directory of a run "
            "on this base (--save adapter or both); none: train once, and what asks for a teacher "
            "asks the base. Default: control, or none with --against.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            help="Measure quality and locality before and after, and of the NLL-only run if there "
            "is one, for melinoe.json and the card.",
            rich_help_panel=_DATA,
        ),
    ] = True,
    against: Annotated[
        Path | None,
        typer.Option(
            help="The NLL-only run to state price and saving against: what --control wrote from "
            "the same data and settings. Default: the one that --teacher or a price has.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            help="Find the strongest --lambda-cache whose perplexity on held-out text is at most "
            "this above the NLL-only run's: 1% or 0.01. Trains that run too, and several more.",
            rich_help_panel=_PRICE,
        ),
    ] = None,
    max_other_ppl_increase: Annotated[
        str | None,
        typer.Option(help="The same bound on the --other texts.", rich_help_panel=_PRICE),
    ] = None,
    price_reference: Annotated[
        Path | None,
        typer.Option(
            help="The NLL-only run that an earlier search wrote, OUT.reference, to save training "
            "it again.",
            rich_help_panel=_PRICE,
        ),
    ] = None,
    price_runs: Annotated[
        int,
        typer.Option(help="Runs that the search may train.", min=1, rich_help_panel=_PRICE),
    ] = 4,
    steer: Annotated[
        bool,
        typer.Option(
            help="Search within one run, by changing --lambda-cache on the way: for long runs.",
            rich_help_panel=_PRICE,
        ),
    ] = False,
    *,
    given: dict[str, Any],
) -> None:
    """
    Fine-tune any supported MoE checkpoint so that each sequence prefers few experts.

    On several devices: accelerate launch -m melinoe finetune ... (on the CPU with --multi_gpu; on
    several nodes with OUT on a disk that all share).
    """
    settings = FinetuneSettings(**given)
    price = _price(max_ppl_increase, max_other_ppl_increase)
    if price is None and (price_reference is not None or steer):
        raise TrainingError(
            "--price-reference and --steer are for a search within --max-ppl-increase; give that, "
            "or leave them out (an NLL-only run to compare with is named by --against)"
        )
    # --lambda-match 0, and no other term that asks a teacher: none is wanted.
    source = context.get_parameter_source("lambda_match")
    matching = settings.is_taught or source is None or source.name == "DEFAULT"
    if teacher is None and not settings.is_control and against is None and matching:
        teacher = CONTROL
    if teacher == "none":
        teacher = None
    if control:
        _say_unused(teacher=teacher, anchor_data=anchor_data)
        teacher = None
    if control:
        settings = settings.control()
    elif teacher is not None and not settings.is_taught and matching:
        settings = replace(settings, lambda_match=MATCH)
    from melinoe.checkpoint import check_output
    from melinoe.data import load_examples
    from melinoe.finetune import finetune, finetune_taught
    from melinoe.finetune.processes import leave

    options.quiet()
    check_output(out)
    if against is not None:
        _check_against(against, settings, measure)
    examples = load_examples(data, split=split, limit=limit)
    # Before any training, so that bad held-out data costs no time.
    held_out = measuring.hold_out(
        data, examples, eval_data, eval_split, other or [], hold_out, limit
    )
    anchor = _anchor(anchor_data, split, limit, settings) if anchor_data and not control else None
    if teacher == CONTROL and price is None:
        against_it = measure and settings.save != "adapter"
        options.say(
            "two runs: the NLL-only control first, which then teaches"
            f"{' and is what the price is measured against' if against_it else ''}; "
            "--teacher none trains once"
        )
    with training_progress() as progress:
        common: dict[str, Any] = {
            "eval_examples": held_out.examples,
            "anchor_examples": anchor,
            "progress": progress,
            "callbacks": progress.callbacks,
            "resume": resume,
        }
        if teacher is not None and (price is not None or teacher != CONTROL):
            common["teacher"] = teacher
        place = (options.resolve(model), held_out.train, out, settings)
        if price is None:
            run = finetune_taught if teacher == CONTROL else finetune
            result = run(*place, **common)
        else:
            from melinoe.finetune.price.search import finetune_within

            result = finetune_within(
                *place,
                price,
                other_examples=[one for texts in held_out.others.values() for one in texts],
                reference=price_reference,
                runs=price_runs,
                steered=steer,
                **common,
            )
    leave()
    options.say(f"wrote {result.out}")
    if price is not None:
        from melinoe.finetune.price.search import describe

        options.say(describe(result.metadata["price"]))
    if measure and settings.save == "adapter":
        options.say("an adapter alone is not measured; make a checkpoint of it with melinoe merge")
        measure = False
    base = options.resolve(model)
    if measure and price is not None:
        held_out = measuring.judges(held_out, base, settings.max_length)

    def plain() -> Path | None:
        if control or against is not None:
            return against
        return measuring.control_of(result.out, teacher, price_reference, price is not None)

    measuring.finish(result.out, base, data, split, held_out, measure, plain)


def _say_unused(**named: str | None) -> None:
    """A control learns from nothing but its data: what else was named is not dropped in silence."""
    if unused := [f"--{key.replace('_', '-')} {value}" for key, value in named.items() if value]:
        which = " and ".join(unused)
        options.say(f"--control trains on next tokens alone, so {which} will not be used")


def _check_against(against: Path, settings: FinetuneSettings, measure: bool) -> None:
    """Refuse what cannot be this run's control, before it is trained."""
    from dataclasses import asdict

    from melinoe.outcome import check_control

    if not measure or settings.save == "adapter":
        raise TrainingError(
            "--against names a run to measure beside this one, but nothing will be measured; "
            "leave out --no-measure and --save adapter, or --against"
        )
    if settings.is_control:
        raise TrainingError("--against is for a run with locality terms; leave out it or --control")
    check_control(against, {"settings": asdict(settings)})


def _anchor(name: str, split: str, limit: int | None, settings: FinetuneSettings) -> Any:
    """Anchor text, or the word that has the base model write it."""
    from melinoe.data import load_examples

    if settings.lambda_replay == 0:
        raise TrainingError(
            "--anchor-data does nothing while --lambda-replay is 0; set it, 1 is a good start"
        )
    return name if name == "own" else load_examples(name, split=split, limit=limit)


def _price(own: str | None, other: str | None) -> Any:
    """What may be paid, or None; read before anything is loaded."""
    if own is None and other is None:
        return None
    if own is None:
        raise TrainingError(
            "--max-other-ppl-increase needs --max-ppl-increase beside it; give both"
        )
    from melinoe.finetune.price.steering import Price
    from melinoe.finetune.price.strength import parse_increase

    return Price(parse_increase(own), None if other is None else parse_increase(other))
