"""`melinoe finetune`: train a model to need fewer expert transfers."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from melinoe.cli import models, options, output, texts
from melinoe.cli.command import option, with_settings
from melinoe.config import CONTROL, FinetuneSettings, OutcomeSettings
from melinoe.errors import MelinoeError, TrainingError

_OBJECTIVE = "Objective"
_TRAINING = "Training"
_RUN = "Run and output"

_OTHERS: dict[str | None, tuple[str, ...]] = {
    None: ("capacity", "lambda_cache", "steps", "batch_size"),
    _TRAINING: (
        "max_length", "seed",
        "train", "lora_rank", "lora_alpha", "learning_rate", "lora_learning_rate", "epochs",
        "gradient_accumulation", "gradient_checkpointing", "compute_dtype", "warmup",
        "schedule", "max_grad_norm",
    ),
    _RUN: ("log_every", "eval_every", "save_every", "save", "report_to"),
}  # fmt: skip
_NAMED = {name for names in _OTHERS.values() for name in names}
# A setting that no other panel names belongs to the objective.
PANELS = _OTHERS | {
    _OBJECTIVE: tuple(one.name for one in fields(FinetuneSettings) if one.name not in _NAMED)
}


@with_settings(FinetuneSettings, PANELS)
def command(
    context: typer.Context,
    model: options.Model,
    data: options.Examples,
    out: options.Out,
    eval_data: Annotated[
        str | None, option("Held-out examples to measure on. Default: a part of --data.")
    ] = None,
    limit: options.Limit = None,
    gpu_memory: Annotated[
        str | None, option("Train within so much of the GPU, as in 8GiB; experts pass through.")
    ] = None,
    ram: Annotated[
        str | None,
        option("What experts may take of the host; without a GPU, what the run may take."),
    ] = None,
    against: Annotated[
        str | None,
        option(
            "Also measure what locality costs and saves against a control (see --control): its "
            "directory; or the word control: train it first, in OUT.control."
        ),
    ] = None,
    resume: Annotated[
        bool, option("Go on with an interrupted run; where OUT is written, complete its card.")
    ] = False,
    control: Annotated[
        bool, option("Train the control: the same run without the locality terms.", _OBJECTIVE)
    ] = False,
    anchor_data: Annotated[
        str | None,
        option(
            "Text to replay, at --lambda-replay: a file or a hub data set. Default: own, what the "
            "base model writes.",
            _OBJECTIVE,
        ),
    ] = None,
    split: options.Split = "train",
    eval_split: Annotated[str, option("Split of --eval-data on the hub.", options.DATA)] = "test",
    columns: options.Columns = None,
    hold_out: Annotated[
        float, option("Share of --data to measure on.", options.DATA, min=0.0, max=0.5)
    ] = OutcomeSettings().held_out,
    other: options.Other = None,
    measure: Annotated[
        bool, option("Measure before and after, for melinoe.json and the model card.", _RUN)
    ] = True,
    *,
    given: dict[str, Any],
) -> None:
    """
    Fine-tune a model so that its tokens share experts, and fewer must be loaded.

    On several devices: accelerate launch -m melinoe finetune ... (on the CPU with --multi_gpu; on
    several nodes with OUT on a disk that all share).
    """
    said = {name for name in context.params if models.is_given(context, name)}
    settings = FinetuneSettings(**given)
    _check_idle(said, settings, anchor_data)
    if control:
        settings = settings.control()
    from melinoe.data import load_examples
    from melinoe.finetune import finetune
    from melinoe.finetune.run import beside, check_place, leave, train_control

    output.quiet()
    for place in [out, *([beside(out, CONTROL)] if against == CONTROL else [])]:
        check_place(place, resume)
    if against is not None:
        _check_against(settings, measure)
    examples = load_examples(data, split=split, limit=limit, columns=columns)
    # Before any training, so that bad held-out data costs no time.
    held_out = texts.hold_out(
        data, examples, eval_data, eval_split, other or [], hold_out, limit, columns
    )
    anchor: Any = anchor_data
    if anchor_data not in (None, "own"):
        anchor = load_examples(anchor_data, split=split, limit=limit)
    base, train = models.resolve(model), held_out.train
    if against not in (None, CONTROL):
        _check_control(against, settings, base, train)
    common: dict[str, Any] = {"eval_examples": held_out.examples, "anchor_examples": anchor}
    common |= {"progress": output.training_progress, "say": output.say, "resume": resume}
    common |= {"gpu_memory": gpu_memory, "ram": ram}
    if against == CONTROL:
        output.say("first the control, without the locality terms")
        against = str(train_control(base, train, out, settings, **common))
    result = finetune(base, train, out, settings, **common)
    leave()
    output.say(f"wrote {result.out}")
    if rates := result.metadata.get("learning_rates"):
        output.say(
            f"peak learning rates: routers {rates['routers']:.2g}, low-rank updates of rank "
            f"{result.metadata['lora_rank']} {rates['low_rank']:.2g}"
        )
    if measure and settings.save == "adapter":
        output.say("an adapter alone is not measured; make a checkpoint of it with melinoe merge")
        measure = False
    of = None if against is None else Path(against)
    memory: dict[str, Any] | None = None
    if streamed := result.metadata.get("streamed"):  # what measuring may take of the run's budget
        memory = {"gpu_memory": gpu_memory or streamed["budget_bytes"], "ram": ram}
        if models.resolve_device(None) == "cpu":
            memory = {"expert_memory": streamed["measuring_bytes"], "store": "disk"}
    finish(result.out, base, data, split, held_out, measure, of, columns, resume, memory)


def _check_idle(said: set[str], settings: FinetuneSettings, anchor_data: str | None) -> None:
    """Refuse options that others leave without effect."""
    routers = settings.train == "router"
    for why, idle, names in (
        ("--lambda-replay is 0", settings.lambda_replay == 0, ("own_texts", "anchor_data")),
        ("--anchor-data gives the text", anchor_data not in (None, "own"), ("own_texts",)),
        ("--train is router", routers, ("lora_rank", "lora_alpha", "lora_learning_rate")),
    ):
        for name in names if idle else ():
            if name in said:
                raise TrainingError(
                    f"--{name.replace('_', '-')} does nothing while {why}; leave it out"
                )


def _check_against(settings: FinetuneSettings, measure: bool) -> None:
    """Refuse a control beside what is not compared with one."""
    if not measure or settings.save == "adapter":
        raise TrainingError(
            "--against names a run to measure beside this one, but nothing will be measured; "
            "leave out --no-measure and --save adapter, or --against"
        )
    if settings.is_control:
        raise TrainingError("--against is for a run with locality terms; leave out it or --control")


def _check_control(against: str, settings: FinetuneSettings, base: str, examples: Any) -> None:
    """Refuse what is not this run's control, before it is trained."""
    from melinoe.checkpoint import load_backbone, load_tokenizer, open_checkpoint
    from melinoe.data import encode
    from melinoe.finetune.resume import data_fingerprint
    from melinoe.moe.routing import fingerprint
    from melinoe.outcome import check_control

    with open_checkpoint(base) as checkpoint:
        routers = fingerprint(load_backbone(checkpoint))
        tokenizer = load_tokenizer(base, checkpoint.config)
    encoded = encode(examples, tokenizer, settings.max_length)
    known = {"settings": asdict(settings), "base_fingerprint": routers}
    check_control(against, known | {"data": {"tokens_sha256": data_fingerprint(encoded)}})


def finish(
    out: Path,
    base: str,
    data: str,
    split: str,
    held_out: texts.HeldOut,
    measure: bool = True,
    control: Path | None = None,
    columns: str | None = None,
    resume: bool = False,
    memory: dict[str, Any] | None = None,
) -> None:
    """
    Complete a fine-tuned checkpoint, once: its origin, its measured outcome, its card.

    TrainingError: measuring failed; the checkpoint is whole, with a card of what was measured.
    """
    if not output.is_main_process():
        return
    from melinoe.outcome import record_origin, record_outcome
    from melinoe.report.card import write_card

    more = {} if columns is None else {"columns": columns}
    record_origin(out, base, data, held_out.train, split, held_out=len(held_out.examples), **more)
    failed: Exception | None = None
    if measure and not held_out.examples:
        output.say(
            "too few examples to hold some out, so nothing was measured before and after; give "
            "--eval-data"
        )
    elif measure and not (resume and _is_measured(out, control)):
        of = {held_out.domain: held_out.examples}
        how: dict[str, Any] = {"device": models.resolve_device(None), "memory": memory}
        how |= {"control": control, "say": output.say}
        try:
            record_outcome(out, base, of, held_out.others, **how)
        except (MelinoeError, OSError) as error:  # or the disk is full
            failed = error
    write_card(out)
    output.say(f"wrote {out}/README.md and its figures")
    if failed is not None:
        raise _unmeasured(out, control, failed) from failed


def _is_measured(out: Path, control: Path | None) -> bool:
    """Tell whether the outcome is recorded, with that of the control if there is one."""
    from melinoe.checkpoint import read_metadata

    outcome = read_metadata(out).get("outcome") or {}
    if control is None or not outcome:
        return bool(outcome)
    measured = (outcome.get("control_run") or {}).get("fingerprint")
    there = read_metadata(control).get("fingerprint") if control.is_dir() else measured
    return "control" in outcome and measured == there


def _unmeasured(out: Path, control: Path | None, error: Exception) -> TrainingError:
    """Say what was written and what was not measured, after an error on the way to the outcome."""
    from melinoe.checkpoint import read_metadata

    if control is not None and read_metadata(out).get("outcome"):
        return TrainingError(
            f"{out} is written, whole and measured beside its base, but not beside the control "
            f"({error}); `melinoe evaluate {out} CONTROL` compares it with a checkpoint of one, "
            "which `melinoe merge` makes of an adapter"
        )
    return TrainingError(
        f"{out} is written and whole, but could not be measured ({error}); measure it with "
        "`melinoe evaluate`"
    )
