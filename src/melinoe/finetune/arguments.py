"""Our settings in the words of transformers' Trainer."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainingArguments

from melinoe.config import FinetuneSettings
from melinoe.errors import DependencyError
from melinoe.finetune.parts.adapters import TrainedParts
from melinoe.finetune.rates import Rates

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(settings: FinetuneSettings, output_dir: str | Path) -> TrainingArguments:
    """
    The Trainer's arguments, but for steps and learning rate: see `set_steps`.

    The settings' type is decided: see `with_compute_dtype`.

    They also say on how many processes the run is, and which of them this one is: making them joins
    the others.

    Raises:
        DependencyError: a tracker that is not installed.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    trackers = list(settings.report_to or ())
    try:
        for tracker in get_reporting_integration_callbacks(trackers):
            tracker()
    except (ImportError, RuntimeError, AssertionError, ValueError) as error:
        raise DependencyError(
            f"report_to names {', '.join(trackers)}, which cannot be used ({error}); install what "
            "it needs, or leave it out"
        ) from error
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        # When to measure and to save is decided in `melinoe.finetune.trainer`.
        save_strategy="no",
        eval_strategy="no",
        seed=settings.seed,
        bf16=settings.compute_dtype == "bfloat16",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        report_to=trackers,
        disable_tqdm=True,
    )


def with_compute_dtype(settings: FinetuneSettings, stored: torch.dtype) -> FinetuneSettings:
    """Decide the type that is computed in, where it is left open, by device and checkpoint."""
    if settings.compute_dtype != "auto":
        return settings
    narrow = torch.cuda.is_available() and stored.itemsize == 2
    return replace(settings, compute_dtype="bfloat16" if narrow else "float32")


def set_steps(
    arguments: TrainingArguments, settings: FinetuneSettings, steps: int, rates: Rates
) -> None:
    """Fill in what depends on the number of processes and on the model: steps and peak rate."""
    arguments.learning_rate = rates.routers
    arguments.max_steps = steps
    arguments.warmup_steps = int(settings.warmup * steps)


def make_optimizer(
    parts: TrainedParts, settings: FinetuneSettings, rates: Rates
) -> torch.optim.Optimizer:
    """AdamW over the trained parts; routers and low-rank updates have rates of their own."""
    groups = [{"params": list(parts.router.values()), "lr": rates.routers}]
    if parts.lora:
        groups.append({"params": list(parts.lora.values()), "lr": rates.low_rank})
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
