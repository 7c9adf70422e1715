"""A checkpoint and examples in; a plain checkpoint in the hub's layout, and a log, out."""

import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from melinoe.checkpoint.files import read_config
from melinoe.checkpoint.opening import find_model_class, open_checkpoint
from melinoe.checkpoint.tokenizer import load_tokenizer
from melinoe.checkpoint.writing import check_output
from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded, Example, encode, load_examples, pad_token_id
from melinoe.finetune.adapters import TrainedParts, make_trainable
from melinoe.finetune.objective import Objective
from melinoe.finetune.order import training_rows
from melinoe.finetune.packing import find_packing
from melinoe.finetune.replay import Replay
from melinoe.finetune.saving import KeptParts, write_result
from melinoe.finetune.trainer import LocalityTrainer, Progress
from melinoe.malloc import keep_freed_memory
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers, fingerprint

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class FinetuneResult:
    """
    What a run left behind.

    Attributes:
        out: Directory of the fine-tuned checkpoint.
        log: Rows of terms over steps; see `LocalityTrainer.rows`.
        metadata: What ``melinoe.json`` holds.
    """

    out: Path
    log: list[dict[str, Any]]
    metadata: dict[str, Any] = field(repr=False)


def finetune(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    *,
    eval_examples: Sequence[Example] | None = None,
    anchor_examples: Sequence[Example] | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> FinetuneResult:
    """
    Fine-tune a checkpoint for locality and write the result: a plain checkpoint, or an adapter.

    With ``settings.control()`` the same call is the NLL-only control: same examples in the same
    order, same steps, same starting adapters.

    Args:
        model_path: Checkpoint directory or hub name.
        data: Examples, or what `load_examples` takes.
        out: Directory to write; must not exist, or be empty.
        settings: Everything that decides the run.
        eval_examples: Held-out examples, measured before and after.
        anchor_examples: Text of other kinds whose quality the run should keep; replayed beside the
            data where ``settings.lambda_replay`` is above 0.
        progress: Called with each log row; ``steps`` in it is the number of steps to come to.
        callbacks: As in `train`. What one's ``metadata()`` gives, if it has such a method, goes
            into the record of the run.

    Raises:
        OutputExistsError: *out* is taken; nothing was trained.
        DataError: unusable data.
        CheckpointError, TokenizerError: *model_path* cannot be read.
        UnsupportedModelError: no experts, or routers that cannot be trained.
        TrainingError: settings that do not fit the model, or too many non-finite losses; nothing
            was written.
    """
    path, name = check_output(out), str(model_path)
    with open_checkpoint(name):  # every shard is there and whole, before hours of work
        config = read_config(name)
    tokenizer = load_tokenizer(name, config)
    from_name = isinstance(data, (str, Path))
    examples = load_examples(data) if isinstance(data, (str, Path)) else list(data)
    encoded = encode(examples, tokenizer, settings.max_length)
    held_out = encode(eval_examples, tokenizer, settings.max_length) if eval_examples else None
    anchor = encode(anchor_examples, tokenizer, settings.max_length) if anchor_examples else None
    model = find_model_class(config).from_pretrained(name, dtype="auto")
    base_fingerprint = fingerprint(model)
    kept = KeptParts(model, settings)
    started = time.monotonic()
    rows, skipped = train(
        model,
        encoded,
        settings,
        pad_token_id=pad_token_id(tokenizer),
        eval_data=held_out,
        anchor_data=anchor,
        progress=progress,
        callbacks=callbacks,
        before_merge=kept,
    )
    metadata = {
        "base": name,
        "base_fingerprint": base_fingerprint,
        "fingerprint": fingerprint(model),
        "settings": asdict(settings),
        "data": {"source": str(data) if from_name else None, "examples": len(encoded)},
        "log": rows,
        "skipped_steps": skipped,
        "router_rounding": kept.router_rounding(model),
        "seconds": round(time.monotonic() - started, 1),
        "versions": {
            "melinoe": version("melinoe"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for callback in callbacks:
        if hasattr(callback, "metadata"):
            metadata.update(callback.metadata())
    write_result(model, tokenizer, path, metadata, kept)
    return FinetuneResult(path, rows, metadata)


def train(
    model: Any,
    data: Sequence[Encoded],
    settings: FinetuneSettings,
    *,
    pad_token_id: int,
    eval_data: Sequence[Encoded] | None = None,
    anchor_data: Sequence[Encoded] | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    before_merge: Callable[[TrainedParts], None] | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """
    Fine-tune a model in memory; at the end it is plain again, its adapters merged.

    Args:
        model: A transformers model with a next-token loss. On return its tensors have the types
            they came with, its config is as it was, and it is in evaluation mode.
        data: Encoded examples.
        settings: Everything that decides the run.
        pad_token_id: Any id; padding is masked.
        eval_data: Measured before the first and after the last step.
        anchor_data: Text to replay beside *data*, for ``settings.lambda_replay``.
        progress: Called with each log row.
        callbacks: Of transformers' kind, run beside Melinoe's own. One that has a method
            ``attach(trainer)`` is called with the `LocalityTrainer` before the first step: it finds
            ``locality`` (the `Objective`, whose weights it may change) and ``measure(examples)``
            there.
        before_merge: Called with the trained parts in float32, before they become the model's own.

    Returns:
        Log rows, and how many steps were skipped for a non-finite loss. Rows at the first and the
        last step hold ``eval_nll`` and ``eval_cache`` where *eval_data* is given.

    Raises:
        UnsupportedModelError, TrainingError: as `finetune`.
    """
    routers, layers = find_routers(model), find_experts(model)
    replay = None
    if anchor_data:
        replay = Replay(anchor_data, settings.replay_batch_size, pad_token_id, settings.seed)
    objective = Objective(routers, settings, replay=replay)
    padding = Collator(pad_token_id)
    stored = {name: tensor.dtype for name, tensor in _tensors(model)}
    if not torch.cuda.is_available():
        keep_freed_memory()
    if not settings.bf16:
        model.float()
    changed = _switch_off_balancing(model)
    # The Trainer switches the key-value cache off in the config, and would leave it so.
    if hasattr(model.config, "use_cache"):
        changed.append((model.config, {"use_cache": model.config.use_cache}))
    parts = make_trainable(model, routers, layers, settings)
    objective.updates = getattr(parts, "updates", None)
    steps, rows = training_rows([len(one) for one in data], settings)
    packing = find_packing(model, pad_token_id) if settings.packing else None
    dataset = [[data[index] for index in row] if packing else data[row[0]] for row in rows]
    # The Trainer makes its directory even where it saves nothing.
    with tempfile.TemporaryDirectory() as work:
        trainer = LocalityTrainer(
            settings=settings,
            objective=objective,
            parts=parts,
            held_out=eval_data,
            padding=padding,
            packing=packing,
            progress=progress,
            model=model,
            args=_arguments(settings, steps, work),
            train_dataset=dataset,
            data_collator=packing.collator if packing else padding,
            optimizers=(_optimizer(parts, settings), None),
            callbacks=list(callbacks),
        )
        for callback in callbacks:
            if hasattr(callback, "attach"):
                callback.attach(trainer)
        trainer.train()
    trainer.accelerator.free_memory()
    if before_merge is not None:
        before_merge(parts)
    parts.merge(model)
    model.requires_grad_(True).eval()
    for config, values in changed:
        for key, value in values.items():
            setattr(config, key, value)
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(stored.get(name, tensor.dtype))
    return trainer.rows, trainer.skipped_steps


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _switch_off_balancing(model: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Keep transformers from adding its load-balancing loss; what the configs said before."""
    before, pending = [], [model.config]
    while pending:
        config = pending.pop()
        pending += [getattr(config, key) for key in config.sub_configs if hasattr(config, key)]
        off = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
        present = {key: getattr(config, key) for key in off if hasattr(config, key)}
        before.append((config, present))
        for key in present:
            setattr(config, key, off[key])
    return before


def _optimizer(parts: TrainedParts, settings: FinetuneSettings) -> torch.optim.Optimizer:
    groups = [{"params": list(parts.router.values()), "lr": settings.learning_rate}]
    if parts.lora:
        lora_rate = settings.lora_learning_rate or settings.learning_rate
        groups.append({"params": list(parts.lora.values()), "lr": lora_rate})
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def _arguments(settings: FinetuneSettings, steps: int, work: str) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=work,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=int(settings.warmup * steps),
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        seed=settings.seed,
        bf16=settings.bf16,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        report_to=[],
        disable_tqdm=True,
    )
