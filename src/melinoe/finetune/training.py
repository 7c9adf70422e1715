"""Train a model that is in memory on encoded examples."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded
from melinoe.errors import InterruptedRunError, TrainingError
from melinoe.finetune.adapter import Adapter, adapter_of
from melinoe.finetune.objective import Objective, Replay
from melinoe.finetune.own_text import OWN
from melinoe.finetune.parts import TrainedParts, make_trainable
from melinoe.finetune.preparing import ReadyModel, recomputes
from melinoe.finetune.processes import freeze_unreached, is_sharded
from melinoe.finetune.rates import Rates
from melinoe.finetune.resume import (
    StopRequest,
    check_same_run,
    data_fingerprint,
    identity,
    newest_checkpoint,
    put,
)
from melinoe.finetune.rows import check_data, find_packing, rows_of
from melinoe.finetune.teacher import Teacher, teacher_fingerprint
from melinoe.finetune.trainer import (
    LocalityTrainer,
    Progress,
    set_steps,
    training_arguments,
    with_compute_dtype,
)
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """
    Result of training, beside the model.

    Attributes:
        rows: See `LocalityTrainer.rows`.
        skipped_steps: Steps that changed nothing because of a non-finite loss.
        step: Optimiser steps that made the weights: the last, or those up to the best measurement.
        processes: On how many the run was.
        adapter: Where the model was sharded (FSDP2) and stays so, what was trained; else ``None``:
            it is merged into the model.
        rates: The learning rates at their peak.
    """

    rows: list[dict[str, Any]]
    skipped_steps: int
    step: int
    processes: int
    adapter: Adapter | None
    rates: Rates


def train(
    model: Any,
    data: Sequence[Encoded],
    settings: FinetuneSettings,
    *,
    pad_token_id: int,
    eval_data: Sequence[Encoded] | None = None,
    anchor_data: Sequence[Encoded] | None = None,
    own_text: bool = False,
    teacher: Adapter | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    before_merge: Callable[[TrainedParts], None] | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    arguments: TrainingArguments | None = None,
) -> Trained:
    """
    Fine-tune a model in memory; at the end it is plain again, its updates merged.

    Args:
        model: A transformers model with next-token logits. On return its tensors have the types
            they came with, its config is as it was, and it is in evaluation mode.
        data: Encoded examples.
        settings: Everything that decides the run.
        pad_token_id: Any id; padding is masked.
        eval_data: Measured before the first step, each ``eval_every``, and after the last.
        anchor_data: Text to replay beside *data*, for ``settings.lambda_replay``.
        own_text: Whether the base model wrote that. A run that goes on may have it written anew,
            and another device or number of processes writes it otherwise; other text must agree.
        teacher: Of the same base, from `read_teacher`: whose hidden states
            ``settings.lambda_match`` means, in place of the base model's.
        progress: Called with each log row.
        callbacks: Of transformers' kind, run beside Melinoe's own. One that has a method
            ``attach(trainer)`` is called with the `LocalityTrainer` before the first step: it finds
            ``locality`` (the `Objective`) and ``measure(examples)`` there. Its ``state_dict()`` and
            ``load_state_dict(state)``, if it has them, keep its state (JSON) in checkpoints.
        before_merge: Called with the trained parts in float32, before they become the model's own.
        checkpoints: Directory for the run's checkpoints; Ctrl-C and SIGTERM then end the run after
            its step and leave one.
        resume: Go on from the newest whole one; from the beginning if there is none.
        arguments: Of the Trainer, if they are made already.

    Raises:
        UnsupportedModelError, TrainingError: as `melinoe.finetune.finetune`.
        InterruptedRunError: the run was asked to stop; its state is in *checkpoints*.
    """
    _check_held_out(settings, eval_data)
    check_data(settings, data)
    if teacher is not None and not settings.is_taught:
        raise TrainingError(
            "a teacher does nothing while lambda_match is 0; set it, or give no teacher"
        )
    # The Trainer makes a directory even if it saves nothing.
    stored = find_experts(model)[0].module.get_parameter("down_proj").dtype
    settings = with_compute_dtype(settings, stored)
    with tempfile.TemporaryDirectory() as work:
        arguments = arguments or training_arguments(settings, checkpoints or work)
        processes, sharded = arguments.world_size, is_sharded(arguments)
        if not sharded:
            model.to(arguments.device)
        base = fingerprint(model)
        routers, layers = find_routers(model), find_experts(model)
        rates = Rates.of(routers, settings)
        if arguments.process_index == 0:
            log.info(
                "hidden size %d: rate of routers %.3g, of low-rank updates %.3g; their rank %d",
                rates.width, rates.routers, rates.low_rank, rates.rank,
            )  # fmt: skip
        steps, rows = rows_of(data, settings, processes)
        tokens = settings.batch_size * max(sum(map(len, row)) for row in rows)
        top_k = routers[0].top_k or 1
        recompute = recomputes(model, layers[0], settings, tokens, top_k, arguments.device)
        ready = ReadyModel(model, settings, recompute)
        parts = make_trainable(model, routers, layers, settings, rates.rank)
        objective = Objective(
            routers,
            settings,
            parts=parts,
            replay=Replay(anchor_data, pad_token_id, settings.seed) if anchor_data else None,
            teacher=None if teacher is None else Teacher(teacher, parts, layers, arguments.device),
        )
        if processes > 1:
            freeze_unreached(model, parts)
            arguments.ddp_find_unused_parameters = False
        set_steps(arguments, settings, steps, rates)
        packing = find_packing(model, pad_token_id) if settings.packing else None
        padding = Collator(pad_token_id)
        per_step = settings.batch_size * settings.gradient_accumulation * processes
        taught = None if teacher is None else teacher_fingerprint(teacher)
        named = replace(
            settings,
            learning_rate=rates.routers,
            lora_learning_rate=rates.low_rank,
            lora_rank=rates.rank,
        )
        replayed = OWN if own_text else data_fingerprint(anchor_data) if anchor_data else None
        ours = identity(named, data, per_step, base, taught, replayed)
        start = _start(checkpoints, ours, arguments) if resume else None
        ready.recompute()
        stop = StopRequest()
        trainer = LocalityTrainer(
            settings=settings,
            rates=rates,
            objective=objective,
            parts=parts,
            held_out=eval_data,
            padding=padding,
            packing=packing,
            progress=progress,
            checkpoints=checkpoints,
            identity=ours,
            stop=stop,
            model=model,
            args=arguments,
            train_dataset=rows if packing else [row[0] for row in rows],
            data_collator=packing.collator if packing else padding,
            callbacks=list(callbacks),
        )
        if sharded != (trainer.accelerator.distributed_type == "FSDP"):
            raise TrainingError(
                "the run was launched to be sharded (FSDP), but accelerate shards nothing on this "
                f"kind of device ({arguments.device.type}); launch it without"
            )
        for callback in callbacks:
            if hasattr(callback, "attach"):
                callback.attach(trainer)
        if checkpoints is None:
            trainer.train()
        else:
            with stop.listening():
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
    if trainer.stopped:
        raise InterruptedRunError(
            f"the run was stopped after step {trainer.state.global_step} of {steps}; its state is "
            f"kept in {checkpoints}, so the same command with --resume goes on from there"
        )
    step = trainer.state.global_step
    if step and trainer.skipped_steps == step:
        raise TrainingError(
            f"no step of {step} had a finite loss, so nothing was learned; lower learning_rate or "
            "lambda_cache, or load the model in another dtype"
        )
    if settings.keep == "best" and trainer.best is not None:
        step = trainer.best["step"]
        for name, parameter in trainer.trained().items():
            put(parameter, trainer.best_parts[name])
    if before_merge is not None:
        before_merge(parts)
    adapter = adapter_of(parts) if sharded else None
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    ready.switch_back()
    if not sharded:
        ready.make_plain(parts)
    return Trained(trainer.rows, trainer.skipped_steps, step, processes, adapter, rates)


def _start(
    checkpoints: Path | None, ours: dict[str, Any], arguments: TrainingArguments
) -> Path | None:
    """Find this run's checkpoint to go on from; none: begin anew, with a warning."""
    start = None if checkpoints is None else newest_checkpoint(checkpoints)
    if start is not None:
        check_same_run(start, ours)
    elif arguments.process_index == 0:
        log.warning("%s has no checkpoint to go on from: the run begins anew", checkpoints)
    return start


def _check_held_out(settings: FinetuneSettings, eval_data: Sequence[Encoded] | None) -> None:
    for name, needs in (("eval_every", settings.eval_every), ("keep", settings.keep == "best")):
        if needs and not eval_data:
            raise TrainingError(
                f"{name}={getattr(settings, name)} needs held-out examples to measure; give some "
                "(--eval-data), or leave it out"
            )
