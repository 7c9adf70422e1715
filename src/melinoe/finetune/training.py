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
from melinoe.errors import DataError, InterruptedRunError, TrainingError
from melinoe.finetune.adapter import Adapter, adapter_of
from melinoe.finetune.head import logits_of, model_outputs
from melinoe.finetune.objective import Objective, Replay
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
from melinoe.finetune.rows import rows_of
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
    """Result of training, beside the model."""

    rows: list[dict[str, Any]]  # the log, as `LocalityTrainer.rows`
    skipped_steps: int
    step: int  # optimiser steps that were taken
    processes: int
    rates: Rates  # at their peak
    # In float32. It is in the model's weights too, but for a sharded model and for experts that
    # are in a store.
    adapter: Adapter
    sharded: bool  # by FSDP2, and it stays so


def train(
    model: Any,
    data: Sequence[Encoded],
    settings: FinetuneSettings,
    *,
    pad_token_id: int,
    eval_data: Sequence[Encoded] | None = None,
    anchor_data: Sequence[Encoded] | None = None,
    own_text: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoints: Path | None = None,
    resume: bool = False,
    arguments: TrainingArguments | None = None,
    stream: ExpertStream | None = None,
) -> Trained:
    """
    Fine-tune a model in memory; at the end it is plain again, its updates merged.

    Args, where they are not as `melinoe.finetune.finetune`'s: data are encoded. *own_text*: the
    base model wrote *anchor_data*; a run that goes on may have it written anew. *checkpoints*:
    directory for the run's; Ctrl-C and SIGTERM then end it after its step and leave one. *stream*
    computes the experts of a model without them, from `load_backbone`; the updates are then in
    `Trained.adapter`. On return tensors have the types they came with.

    UnsupportedModelError, TrainingError, InterruptedRunError: as `melinoe.finetune.finetune`.
    """
    if settings.eval_every and not eval_data:
        raise TrainingError(
            f"eval_every={settings.eval_every} needs held-out examples to measure; give some "
            "(--eval-data), or leave it out"
        )
    if not any(any(one.completion_mask) for one in data):
        raise DataError(
            "no example has a token to learn, all are prompt; give completions, or a larger "
            "max_length if they were cut off"
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
        tokens = settings.batch_size * max(map(len, rows))
        top_k = routers[0].top_k or 1
        streamed = stream is not None
        recompute = recomputes(model, layers[0], settings, tokens, top_k, device, streamed)
        ready = ReadyModel(model, settings, recompute, stream)
        compute = grouped_experts if stream is None else stream.compute
        where = None if stream is None else stream.updates_on
        parts = make_trainable(model, routers, layers, settings, rates.rank, compute, where)
        if where is not None and where != device:  # or the Trainer would move them
            model.hf_device_map = {"": str(device), "updates": str(where)}
        replay = Replay(anchor_data, pad_token_id, settings.seed) if anchor_data else None
        objective = Objective(routers, settings, replay)
        if processes > 1:
            _freeze_unreached(model, parts)
            arguments.ddp_find_unused_parameters = False
        set_steps(arguments, settings, steps, rates)
        padding = Collator(pad_token_id)
        replayed = OWN if own_text else data_fingerprint(anchor_data) if anchor_data else None
        found = replace(settings, learning_rate=rates.routers, lora_rank=rates.rank)
        ours = identity(
            replace(found, lora_learning_rate=rates.low_rank),
            rows_per_step=settings.batch_size * settings.gradient_accumulation * processes,
            **{"data": data_fingerprint(data), "base model": base, "anchor text": replayed},
        )
        start = newest_checkpoint(checkpoints) if resume and checkpoints else None
        if start is not None:
            check_same_run(start, read_state(start)["run"], ours, "start anew without --resume")
        elif resume and main:
            log.warning("%s has no checkpoint to go on from: the run begins anew", checkpoints)
        ready.recompute()
        stop = StopRequest()
        trainer = LocalityTrainer(
            settings=settings, rates=rates, objective=objective, parts=parts, held_out=eval_data,
            padding=padding, progress=progress, checkpoints=checkpoints, identity=ours, stop=stop,
            stream=stream, model=model, args=arguments, train_dataset=rows, data_collator=padding,
            callbacks=list(callbacks),
        )  # fmt: skip
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
    adapter = adapter_of(parts)
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    ready.switch_back()
    vars(model).pop("hf_device_map", None)  # or a later Trainer would leave it where it is
    if not sharded:
        if parts.updates is not None:
            parts.updates.remove()
        ready.make_plain()
        adapter.apply(model, experts=stream is None)
    return Trained(trainer.rows, trainer.skipped_steps, step, processes, rates, adapter, sharded)


def with_compute_dtype(settings: FinetuneSettings, stored: torch.dtype) -> FinetuneSettings:
    """Decide the type to compute in, where it is left open, by device and checkpoint."""
    if settings.compute_dtype != "auto":
        return settings
    narrow = torch.cuda.is_available() and stored.itemsize == 2
    return replace(settings, compute_dtype="bfloat16" if narrow else "float32")


def _freeze_unreached(model: Any, parts: TrainedParts) -> None:
    """Leave out parameters that no gradient reaches, which several processes wait for."""
    few = torch.arange(1, 6, device=model.get_input_embeddings().weight.device)[None]
    with torch.enable_grad():
        logits = logits_of(model, model_outputs(model, {"input_ids": few}))
        names = [*parts.router, *parts.lora]
        gradients = torch.autograd.grad(logits.float().sum(), parts.all(), allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            group = parts.router if name in parts.router else parts.lora
            group.pop(name).requires_grad_(False)
