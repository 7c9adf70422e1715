"""Train a model that is in memory on encoded examples."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded
from melinoe.errors import InterruptedRunError, TrainingError
from melinoe.finetune.adapter import Adapter, Teacher, adapter_of
from melinoe.finetune.objective import Objective, Replay, logits_of, model_outputs
from melinoe.finetune.own_text import OWN
from melinoe.finetune.parts import TrainedParts, make_trainable
from melinoe.finetune.preparing import ReadyModel, recomputes
from melinoe.finetune.rates import Rates
from melinoe.finetune.resume import (
    StopRequest,
    check_same_run,
    data_fingerprint,
    identity,
    newest_checkpoint,
    read_state,
)
from melinoe.finetune.rows import check_data, find_packing, rows_of
from melinoe.finetune.stream import ExpertStream
from melinoe.finetune.trainer import (
    LocalityTrainer,
    Progress,
    is_sharded,
    set_steps,
    training_arguments,
)
from melinoe.moe.experts import find_experts
from melinoe.moe.grouped import grouped_experts
from melinoe.moe.routing import find_routers, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """
    Result of training, beside the model.

    Attributes:
        rows, skipped_steps: As the `LocalityTrainer`'s.
        step: Optimiser steps that were taken.
        processes: On how many the run was.
        rates: The learning rates at their peak.
        changed: Full names of the model's tensors that training changes.
        adapter: What was trained, if it was to be kept, or could not be merged: the model is
            sharded, or its experts are in a store.
        sharded: Whether the model is (FSDP2): it stays so, and the adapter is not merged into it.
    """

    rows: list[dict[str, Any]]
    skipped_steps: int
    step: int
    processes: int
    rates: Rates
    changed: list[str]
    adapter: Adapter | None
    sharded: bool


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
    keep_adapter: bool = False,
    checkpoints: Path | None = None,
    resume: bool = False,
    arguments: TrainingArguments | None = None,
    stream: ExpertStream | None = None,
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
        callbacks: Of transformers' kind, run beside Melinoe's own.
        keep_adapter: Copy what was trained, in float32, before it becomes the model's own.
        checkpoints: Directory for the run's checkpoints; Ctrl-C and SIGTERM then end the run after
            its step and leave one.
        resume: Go on from the newest whole one; from the beginning if there is none.
        arguments: Of the Trainer, if they are made already.
        stream: Computes the experts of a model without them, from `load_backbone`. On return the
            model still has none, and the updates are in `Trained.adapter`.

    Raises:
        UnsupportedModelError, TrainingError: as `melinoe.finetune.finetune`.
        InterruptedRunError: the run was asked to stop; its state is in *checkpoints*.
    """
    if settings.eval_every and not eval_data:
        raise TrainingError(
            f"eval_every={settings.eval_every} needs held-out examples to measure; give some "
            "(--eval-data), or leave it out"
        )
    check_data(settings, data)
    if teacher is not None and not settings.is_taught:
        raise TrainingError(
            "a teacher does nothing while lambda_match is 0; set it, or give no teacher"
        )
    layers = find_experts(model) if stream is None else stream.layers
    stored = layers[0].module.get_parameter("down_proj").dtype
    settings = with_compute_dtype(settings, stored)
    with tempfile.TemporaryDirectory() as work:  # the Trainer makes one even if it saves nothing
        arguments = arguments or training_arguments(settings, checkpoints or work)
        processes, device, sharded = arguments.world_size, arguments.device, is_sharded(arguments)
        main = arguments.process_index == 0
        if not sharded:
            model.to(device)
        base = fingerprint(model)
        routers = find_routers(model)
        rates = Rates.of(routers, settings)
        if main:
            log.info(
                "hidden size %d: rate of routers %.3g, of low-rank updates %.3g; their rank %d",
                rates.width, rates.routers, rates.low_rank, rates.rank,
            )  # fmt: skip
        steps, rows = rows_of(data, settings, processes)
        tokens = settings.batch_size * max(sum(map(len, row)) for row in rows)
        top_k = routers[0].top_k or 1
        streamed = stream is not None
        recompute = recomputes(model, layers[0], settings, tokens, top_k, device, streamed)
        ready = ReadyModel(model, settings, recompute, stream)
        compute = grouped_experts if stream is None else stream.compute
        where = None if stream is None else stream.updates_on
        parts = make_trainable(model, routers, layers, settings, rates.rank, compute, where)
        if where is not None and where != device:  # or the Trainer would move them
            model.hf_device_map = {"": str(device), "updates": str(where)}
        objective = Objective(
            routers,
            settings,
            parts=parts,
            replay=Replay(anchor_data, pad_token_id, settings.seed) if anchor_data else None,
            teacher=None if teacher is None else Teacher(teacher, parts, device),
        )
        if processes > 1:
            _freeze_unreached(model, parts)
            arguments.ddp_find_unused_parameters = False
        set_steps(arguments, settings, steps, rates)
        packing = find_packing(model, pad_token_id) if settings.packing else None
        padding = Collator(pad_token_id)
        replayed = OWN if own_text else data_fingerprint(anchor_data) if anchor_data else None
        ours = identity(
            replace(
                settings,
                learning_rate=rates.routers,
                lora_learning_rate=rates.low_rank,
                lora_rank=rates.rank,
            ),
            rows_per_step=settings.batch_size * settings.gradient_accumulation * processes,
            **{
                "data": data_fingerprint(data),
                "base model": base,
                "teacher": None if teacher is None else teacher.sha256,
                "anchor text": replayed,
            },
        )
        start = newest_checkpoint(checkpoints) if resume and checkpoints else None
        if start is not None:
            check_same_run(start, read_state(start)["run"], ours, "start anew without --resume")
        elif resume and main:
            log.warning("%s has no checkpoint to go on from: the run begins anew", checkpoints)
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
            stream=stream,
            model=model,
            args=arguments,
            train_dataset=rows if packing else [row[0] for row in rows],
            data_collator=packing.collator if packing else padding,
            callbacks=list(callbacks),
        )
        if sharded != (trainer.accelerator.distributed_type == "FSDP"):
            raise TrainingError(
                "the run was launched to be sharded (FSDP), but accelerate shards nothing on this "
                f"kind of device ({device.type}); launch it without"
            )
        if checkpoints is None:
            trainer.train()
        else:
            with stop.listening():
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
    step = trainer.state.global_step
    if trainer.stopped:
        raise InterruptedRunError(
            f"the run was stopped after step {step} of {steps}; its state is kept in "
            f"{checkpoints}, so the same command with --resume goes on from there"
        )
    if step and trainer.skipped_steps == step:
        raise TrainingError(
            f"no step of {step} had a finite loss, so nothing was learned; lower learning_rate or "
            "lambda_cache, or load the model in another dtype"
        )
    kept = keep_adapter or sharded or stream is not None
    adapter = adapter_of(parts) if kept else None
    changed = parts.names()
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    ready.switch_back()
    vars(model).pop("hf_device_map", None)  # or a later Trainer would leave it where it is
    if not sharded:
        ready.make_plain(parts)
    return Trained(
        trainer.rows, trainer.skipped_steps, step, processes, rates, changed, adapter, sharded
    )


def with_compute_dtype(settings: FinetuneSettings, stored: torch.dtype) -> FinetuneSettings:
    """Decide the type to compute in, where it is left open, by device and checkpoint."""
    if settings.compute_dtype != "auto":
        return settings
    narrow = torch.cuda.is_available() and stored.itemsize == 2
    return replace(settings, compute_dtype="bfloat16" if narrow else "float32")


def _freeze_unreached(model: Any, parts: TrainedParts) -> None:
    """
    Leave out trained parameters that no gradient ever reaches, such as a bias of the choice alone.

    Several processes wait for every parameter's gradient, or search each step's graph for them.
    """
    few = torch.arange(1, 6, device=model.get_input_embeddings().weight.device)[None]
    with torch.enable_grad():
        logits = logits_of(model, model_outputs(model, {"input_ids": few}))
        names = [*parts.router, *parts.lora]
        gradients = torch.autograd.grad(logits.float().sum(), parts.all(), allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            group = parts.router if name in parts.router else parts.lora
            group.pop(name).requires_grad_(False)
