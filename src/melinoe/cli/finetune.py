"""`melinoe finetune`: train a model to need fewer expert transfers."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import measuring, options
from melinoe.cli.progress import training_progress
from melinoe.cli.settings import with_settings
from melinoe.config import CONTROL, MATCH, PLAIN, FinetuneSettings, OutcomeSettings
from melinoe.errors import TrainingError

_DATA, _PRICE, _RUN = "Data", "The price", "The run on its way"

PANELS = {
    "What is trained for": (
        "capacity", "lambda_cache", "cache_prior", "lambda_rank", "gamma", "cache_loss", "anchor",
    ),
    "How it is trained": (
        "train", "lora_rank", "lora_alpha", "learning_rate", "lora_learning_rate", "steps",
        "epochs", "batch_size", "gradient_accumulation", "max_length", "packing",
        "gradient_checkpointing", "compute_dtype", "warmup", "schedule", "weight_decay",
        "max_grad_norm", "seed",
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
            help="Examples: a file (JSONL, JSON, CSV, Parquet), a directory, a hub data set.",
            rich_help_panel=_DATA,
        ),
    ],
    out: options.Out,
    control: Annotated[
        bool,
        typer.Option(
            help="Train the control of these options: the same run without the locality terms."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            help="Go on from the newest checkpoint of an interrupted run, in OUT.checkpoints; or, "
            "where OUT is written, complete its measuring and its card.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    split: Annotated[
        str, typer.Option(help="Split of a hub data set.", rich_help_panel=_DATA)
    ] = "train",
    columns: Annotated[
        str | None,
        typer.Option(
            help="Of --data and --eval-data: what their columns are, as in prompt=question,"
            "completion=answer. Default: the names of TRL's forms, and some others.",
            rich_help_panel=_DATA,
        ),
    ] = None,
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
            help="Text of other kinds to replay, at --lambda-replay: a file or a hub data set. "
            "Default: own, what the base model writes from an empty prompt.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Learn from an earlier run too, at --lambda-match (10 unless you set it or "
            "--lambda-distill): the directory of a run on this base (--save adapter or both), or "
            "plain: a run on next tokens alone, trained first, in OUT.teacher. Default: none; what "
            "asks for a teacher asks the base.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            help="Measure quality and locality before and after, and of the control if there is "
            "one, for melinoe.json and the card.",
            rich_help_panel=_DATA,
        ),
    ] = True,
    against: Annotated[
        str | None,
        typer.Option(
            help="State price and saving against a control too: the directory of what --control "
            "wrote with otherwise the same options; or control: trained first, in OUT.control.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            help="Find the strongest --lambda-cache whose perplexity on held-out text is at most "
            "this above its control's: 1% or 0.01. Trains that run too, and several more.",
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
            help="The control that an earlier search wrote, OUT.reference, to save training it "
            "again.",
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
    Fine-tune any supported MoE checkpoint with the aim of fewer expert transfers.

    On several devices: accelerate launch -m melinoe finetune ... (on the CPU with --multi_gpu; on
    several nodes with OUT on a disk that all share).
    """
    settings = FinetuneSettings(**given)
    price = _price(max_ppl_increase, max_other_ppl_increase)
    if price is None and (price_reference is not None or steer):
        raise TrainingError(
            "--price-reference and --steer are for a search within --max-ppl-increase; give that, "
            "or leave them out (a control to compare with is named by --against)"
        )
    # --lambda-match 0 is refused with a teacher, where nothing was said it is given a weight.
    source = context.get_parameter_source("lambda_match")
    unsaid = source is None or source.name == "DEFAULT"
    if teacher is not None and not settings.is_taught and unsaid:
        settings = replace(settings, lambda_match=MATCH)
    if control:
        settings = settings.control()
    from melinoe.data import load_examples
    from melinoe.finetune import finetune
    from melinoe.finetune.processes import leave
    from melinoe.finetune.resume.finished import check_place
    from melinoe.finetune.taught import beside, train_control, train_teacher

    options.quiet()
    check_place(out, resume)
    if against is not None:
        _check_against(against, settings, measure, price is not None)
    examples = load_examples(data, split=split, limit=limit, columns=columns)
    # Before any training, so that bad held-out data costs no time.
    held_out = measuring.hold_out(
        data, examples, eval_data, eval_split, other or [], hold_out, limit, columns
    )
    anchor = _anchor(anchor_data, split, limit, settings) if anchor_data else None
    with training_progress() as progress:
        common: dict[str, Any] = {
            "eval_examples": held_out.examples,
            "anchor_examples": anchor,
            "progress": progress,
            "callbacks": progress.callbacks,
            "resume": resume,
        }
        base, train = options.resolve(model), held_out.train
        if teacher == PLAIN and price is None:
            options.say("first the teacher, on next tokens alone")
            teacher = str(train_teacher(base, train, beside(out, "teacher"), settings, **common))
        common["teacher"] = teacher
        if against == CONTROL:
            options.say("first the control, without the locality terms")
            against = str(train_control(base, train, beside(out, "control"), settings, **common))
        if price is None:
            result = finetune(base, train, out, settings, **common)
        else:
            from melinoe.finetune.price.search import finetune_within, reference_place

            result = finetune_within(
                base,
                train,
                out,
                settings,
                price,
                other_examples=[one for texts in held_out.others.values() for one in texts],
                reference=price_reference,
                runs=price_runs,
                steered=steer,
                **common,
            )
            against = str(price_reference or reference_place(result.out))
    leave()
    options.say(f"wrote {result.out}")
    if rates := result.metadata.get("learning_rates"):
        options.say(
            f"peak learning rates: routers {rates['routers']:.2g}, low-rank updates "
            f"{rates['low_rank']:.2g}"
        )
    if price is not None:
        from melinoe.finetune.price.search import describe

        options.say(describe(result.metadata["price"]))
    if measure and settings.save == "adapter":
        options.say("an adapter alone is not measured; make a checkpoint of it with melinoe merge")
        measure = False
    if measure and price is not None:
        held_out = measuring.judges(held_out, base, settings.max_length)

    of = None if against is None else Path(against)
    measuring.finish(result.out, base, data, split, held_out, measure, of, columns, resume)


def _check_against(against: str, settings: FinetuneSettings, measure: bool, priced: bool) -> None:
    """Refuse what cannot be this run's control, before it is trained."""
    from dataclasses import asdict

    from melinoe.outcome import check_control

    if priced:
        raise TrainingError(
            "a search for a price trains a control of its own, and states price and saving against "
            "it; leave out --against (--price-reference names one of an earlier search)"
        )
    if not measure or settings.save == "adapter":
        raise TrainingError(
            "--against names a run to measure beside this one, but nothing will be measured; "
            "leave out --no-measure and --save adapter, or --against"
        )
    if settings.is_control:
        raise TrainingError("--against is for a run with locality terms; leave out it or --control")
    if against != CONTROL:
        check_control(against, {"settings": asdict(settings)})


def _anchor(name: str, split: str, limit: int | None, settings: FinetuneSettings) -> Any:
    """Anchor text, or the word that has the base model write it."""
    from melinoe.data import load_examples

    if settings.lambda_replay == 0:
        raise TrainingError(
            "--anchor-data does nothing while --lambda-replay is 0; leave one of the two out"
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
