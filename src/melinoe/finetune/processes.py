"""What the processes of one run do together, beyond what the Trainer does."""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import TrainingArguments


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


def wait_for_all(arguments: TrainingArguments) -> None:
    """Return when every process has come here."""
    if arguments.world_size > 1:
        torch.distributed.barrier()


def remove_if_empty(directory: Path) -> None:
    """Delete a directory in which nothing was left."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
