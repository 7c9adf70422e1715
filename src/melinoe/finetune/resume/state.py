"""
What a run has to remember to go on as if it had never stopped, and how it is put back.

Trained parts, the optimizer's and the schedule's state, the random states of every process, the log
so far and the terms summed up for its next row, counts of skipped steps, and what callbacks want
kept: a callback with ``state_dict()`` (JSON) and ``load_state_dict(state)`` is asked. Sharded
tensors are gathered to be written and shared out again, so a run may go on with another number of
processes, as long as each optimiser step takes as many rows.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from melinoe.config import FinetuneSettings
from melinoe.data import Encoded
from melinoe.errors import TrainingError
from melinoe.finetune.resume.checkpoints import read_state, read_tensors
from melinoe.finetune.resume.random_state import random_state, set_random_state

if TYPE_CHECKING:
    from melinoe.finetune.trainer import LocalityTrainer

# Settings that may be others when a run goes on: they change no number of its curve, or are
# accounted for by the rows of a step.
_FREE = (
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "save",
    "report_to",
    "max_bad_steps",
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
)


def identity(
    settings: FinetuneSettings,
    data: Sequence[Encoded],
    rows_per_step: int,
    base: str,
    teacher: str | None = None,
) -> dict[str, Any]:
    """What two runs must have in common for one to go on from the other's checkpoint; JSON."""
    kept = {key: value for key, value in asdict(settings).items() if key not in _FREE}
    return {
        **json.loads(json.dumps(kept)),
        "rows_per_step": rows_per_step,
        "data": data_fingerprint(data),
        "base": base,
        "teacher": teacher,
    }


def data_fingerprint(data: Sequence[Encoded]) -> str:
    """Name token ids, and which of them are completion: sha256, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for one in data:
        digest.update(json.dumps([one.input_ids, one.completion_mask]).encode())
    return digest.hexdigest()


def check_same_run(path: Path, ours: dict[str, Any]) -> None:
    """
    Refuse a checkpoint of another run.

    Raises:
        TrainingError: names what differs.
    """
    theirs = read_state(path)["run"]
    differ = [key for key in ours if theirs.get(key) != ours[key]]
    if not differ:
        return
    named = ", ".join(
        key
        if key in ("data", "base", "teacher")
        else f"{key} {theirs.get(key)} there and {ours[key]} here"
        for key in differ
    )
    raise TrainingError(
        f"{path} belongs to another run ({named}); give what that run was given, or start anew "
        "without --resume"
    )


def check_same_settings(
    path: Path, recorded: Mapping[str, Any], settings: FinetuneSettings
) -> None:
    """
    Refuse a finished run that other settings gave, where a resumed call would take it for its own.

    Args:
        path: Of the run.
        recorded: Its settings, from its ``melinoe.json``.
        settings: Now; what decides no weight of such a run may be otherwise.

    Raises:
        TrainingError: names what differs.
    """
    now = {k: v for k, v in settings.deciding().items() if k not in _FREE}
    differ = [key for key in now if recorded.get(key, now[key]) != now[key]]
    if differ:
        named = ", ".join(f"{key} {recorded[key]} there and {now[key]} here" for key in differ)
        raise TrainingError(
            f"{path} is a run with other settings ({named}); give what it was given, or delete it"
        )


def trained_parameters(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Parameters by the names they had before the model was wrapped; sharding makes new ones."""
    now = {
        name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
    }
    return {name: now[name] for name in names}


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, on the CPU; every process must call."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy all of a tensor into one that may be sharded."""
    parameter.copy_(share_out(whole, parameter))


def share_out(whole: Tensor, like: Tensor) -> Tensor:
    """*whole* on the device of *like*, and sharded as it is."""
    if not hasattr(like, "device_mesh"):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def capture(trainer: "LocalityTrainer", *, finished: bool) -> dict[str, dict[str, Tensor]]:
    """
    Every tensor of a checkpoint, in its groups; every process must call.

    Args:
        trainer: Between two steps.
        finished: Leave out what only further steps would need.
    """
    parameters = trainer.trained()
    groups = {
        "parts": {name: gather(parameter) for name, parameter in parameters.items()},
        "best": dict(trainer.best_parts),
        "optimizer": {},
        "run": {},
    }
    if not finished:
        state = trainer.optimizer.state  # type: ignore[union-attr]
        groups["optimizer"] = {
            f"{key}:{name}": gather(value)
            for name, parameter in parameters.items()
            for key, value in state.get(parameter, {}).items()
        }
        device, accelerator = trainer.accelerator.device, trainer.accelerator
        groups["run"] = {
            "random": accelerator.gather(random_state()[None].to(device)).cpu(),
            **{
                f"sum:{name}": accelerator.gather(value[None]).cpu()
                for name, value in trainer.sums.items()
            },
        }
    return groups


def describe(trainer: "LocalityTrainer", *, finished: bool) -> dict[str, Any]:
    """All of a checkpoint that is no tensor; JSON."""
    return {
        "run": trainer.identity,
        "finished": finished,
        "schedule": trainer.lr_scheduler.state_dict(),  # type: ignore[union-attr]
        "rates": [group["lr"] for group in trainer.optimizer.param_groups],  # type: ignore[union-attr]
        "rows": trainer.rows,
        "skipped_steps": trainer.skipped_steps,
        "good_steps": trainer.good_steps,
        "term_norms": trainer.term_norms,
        "best": trainer.best,
        "callbacks": {type(one).__name__: one.state_dict() for one in _stateful(trainer)},
    }


def restore_parts(trainer: "LocalityTrainer", path: Path) -> None:
    """Put the trained parts of a checkpoint into the model, sharded or not."""
    tensors = read_tensors(path, "parts")
    for name, parameter in trainer.trained().items():
        put(parameter, tensors[name])


def restore_rest(trainer: "LocalityTrainer", path: Path) -> None:
    """Put back all but the parts and the random states; each process reads the same files."""
    state, optimizer = read_state(path), trainer.optimizer
    parameters = trainer.trained()
    for key, value in read_tensors(path, "optimizer").items():
        kind, _, name = key.partition(":")
        parameter = parameters[name]
        of_the_parameter = value.shape == parameter.shape and value.dim() > 0
        optimizer.state[parameter][kind] = (  # type: ignore[union-attr]
            share_out(value, parameter) if of_the_parameter else value
        )
    for group, rate in zip(optimizer.param_groups, state["rates"], strict=True):  # type: ignore[union-attr]
        group["lr"] = rate
    trainer.lr_scheduler.load_state_dict(state["schedule"])  # type: ignore[union-attr]
    trainer.rows = state["rows"]
    trainer.skipped_steps = state["skipped_steps"]
    trainer.good_steps = state["good_steps"]
    trainer.term_norms = state["term_norms"]
    trainer.best, trainer.best_parts = state["best"], read_tensors(path, "best")
    accelerator = trainer.accelerator
    for key, value in read_tensors(path, "run").items():
        if key.startswith("sum:"):
            same = len(value) == accelerator.num_processes
            share = value[accelerator.process_index] if same else value.sum(0) / len(value)
            trainer.sums[key.removeprefix("sum:")] = share.to(accelerator.device)
    for one in _stateful(trainer):
        if (kept := state["callbacks"].get(type(one).__name__)) is not None:
            one.load_state_dict(kept)


def restore_random_state(trainer: "LocalityTrainer", path: Path) -> None:
    """Put back this process's random states; with another number of processes they stay anew."""
    states = read_tensors(path, "run").get("random")
    if states is not None and len(states) == trainer.accelerator.num_processes:
        set_random_state(states[trainer.accelerator.process_index])


def _stateful(trainer: "LocalityTrainer") -> list[Any]:
    return [
        one
        for one in trainer.callback_handler.callbacks
        if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
    ]
