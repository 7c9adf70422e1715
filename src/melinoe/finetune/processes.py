"""Let the processes of one run act together, beyond what the Trainer does."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from melinoe.finetune.objective import logits_of, model_outputs
from melinoe.finetune.parts import TrainedParts

_FEW_TOKENS = torch.arange(1, 6)[None]


def is_sharded(arguments: TrainingArguments) -> bool:
    """Whether FSDP shards the model, by the Trainer's arguments or by ``accelerate launch``."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return bool(arguments.fsdp) or launched


def share_routers(parameters: list[nn.Parameter], arguments: TrainingArguments) -> None:
    """
    Give every process the routers of the first.

    With FSDP's memory-saving way of loading, only one process of a machine reads the checkpoint;
    the others get its weights when the model is sharded. The base routers are needed before.
    """
    if arguments.world_size == 1:
        return
    for parameter in parameters:
        there = parameter.data.to(arguments.device)
        torch.distributed.broadcast(there, src=0)
        parameter.data.copy_(there)


def freeze_unreached(model: Any, parts: TrainedParts) -> None:
    """
    Leave out trained parameters that no gradient ever reaches, such as a bias of the choice alone.

    On one process they would simply stay as they are. Several wait for every parameter's gradient
    to be averaged, unless they search the graph of every step for those that have none.
    """
    device = model.get_input_embeddings().weight.device
    with torch.enable_grad():
        logits = logits_of(model, model_outputs(model, {"input_ids": _FEW_TOKENS.to(device)}))
        names = [*parts.router, *parts.lora]
        gradients = torch.autograd.grad(logits.float().sum(), parts.all(), allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            group = parts.router if name in parts.router else parts.lora
            group.pop(name).requires_grad_(False)


def wait_for_all(arguments: TrainingArguments) -> None:
    """Return when every process has come here."""
    if arguments.world_size > 1:
        torch.distributed.barrier()


def leave() -> None:
    """Part from the other processes, at the end of all that is done together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def remove_if_empty(directory: Path) -> None:
    """Delete a directory in which nothing was left."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
