"""
Let a run that ended early go on bit for bit: its checkpoints, what they must agree in, its signals.

    DIR/step-000120/
        parts.safetensors       what is trained, by parameter name
        optimizer.safetensors   the optimizer's state, "<name of state>:<parameter>"
        trainer_state.json      of transformers' Trainer
        state.json              all else, and of every other file its size and SHA-256

A checkpoint is written under another name, forced to the disk, and renamed in one step. One that is
torn all the same (a crash of the machine, a bad disk, a careless hand) is recognised by its sums
and passed over in favour of the one before. Frozen weights are never in it; nothing is pickled.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from melinoe.checkpoint.verifying import sum_of
from melinoe.checkpoint.writing import reason_of
from melinoe.config import FinetuneSettings
from melinoe.data import Encoded
from melinoe.errors import TrainingError, WriteError
from melinoe.whole_file import parse_json, remove_unfinished, unfinished

log = logging.getLogger(__name__)

FORMAT = 3
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})$")
_KEPT = 2  # newest checkpoints that stay
_ECHO_S = 1.0  # a launcher passes on the Ctrl-C that the terminal has sent to every process itself


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    trainer_state: str,
    *,
    more: bool = False,
) -> Path:
    """
    Write the checkpoint of *step* into *directory*, and delete all but the newest two, or three if
    *more*. *tensors*: file name without its ending to tensors by name. WriteError: a full disk, or
    any other reason; the checkpoints before are as they were.
    """
    path = directory / f"step-{step:06d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with unfinished(path) as temporary:
            for name, group in tensors.items():
                if group:
                    whole = {key: value.contiguous() for key, value in group.items()}
                    save_file(whole, temporary / f"{name}.safetensors")
            (temporary / "trainer_state.json").write_text(trainer_state, encoding="utf-8")
            files = {one.name: sum_of(one) for one in sorted(temporary.iterdir())}
            text = json.dumps({"format": FORMAT, "step": step, "files": files, **state})
            (temporary / STATE).write_text(text, encoding="utf-8")
            for one in temporary.iterdir():
                _force_to_disk(one)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            _force_to_disk(directory)
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"the checkpoint of step {step} could not be written to {directory} "
            f"({reason_of(error)}); free some space there, or choose another place"
        ) from error
    # Never the one just written, though a torn one may have a higher step.
    others = [one for one in list_checkpoints(directory) if one != path]
    for old in others[_KEPT - 1 + more :]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """List a run's checkpoints, newest first, whole or not."""
    inside = directory.iterdir() if directory.is_dir() else ()
    found = [(int(match[1]), one) for one in inside if (match := _NAME.search(one.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(directory: Path) -> Path | None:
    """Find the newest whole checkpoint; torn ones are named in warnings. Cost: it is read once."""
    for path in list_checkpoints(directory):
        try:
            state = read_state(path)
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']} is of another release")
            for name, facts in state["files"].items():
                if sum_of(path / name) != facts:
                    raise ValueError(f"{name} is not what was written")
            return path
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is torn (%s), so the one before it is taken", path, error)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read the ``state.json`` of a checkpoint."""
    return parse_json((path / STATE).read_bytes())


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read one group of tensors of a checkpoint; empty if it has none of that name."""
    file = path / f"{name}.safetensors"
    # Copied: what is returned is the file, mapped, and would change with it.
    return {key: one.clone() for key, one in load_file(file).items()} if file.is_file() else {}


def remove_checkpoints(directory: Path) -> None:
    """Delete a run's checkpoints, and its directory if nothing is left in it."""
    for path in list_checkpoints(directory):
        shutil.rmtree(path, ignore_errors=True)
    for one in directory.glob(".step-*"):  # of a process that was killed while it wrote
        remove_unfinished(directory / one.name.split(".")[1])
    remove_if_empty(directory)


def remove_if_empty(directory: Path) -> None:
    """Delete a directory in which nothing was left."""
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def identity(settings: FinetuneSettings, **facts: str | int | None) -> dict[str, Any]:
    """Collect what a run must share with one that it goes on from: its settings, and *facts*."""
    # Accounted for by the rows of a step.
    free = ("batch_size", "gradient_accumulation")
    return {k: v for k, v in settings.deciding().items() if k not in free} | facts


def check_same_run(
    path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], way_out: str
) -> None:
    """Refuse what is left of another run: the TrainingError names what differs."""
    differ = [key for key in ours if theirs.get(key, ours[key]) != ours[key]]
    if differ:
        named = ", ".join(
            f"another {key}" if key in FACTS else f"{key} {theirs[key]} there and {ours[key]} here"
            for key in differ
        )
        raise TrainingError(
            f"{path} belongs to another run ({named}); give what that run was given, or {way_out}"
        )


FACTS = ("data", "base model", "anchor text")
"""Facts of an `identity` that are named without their values."""


def data_fingerprint(data: Sequence[Encoded]) -> str:
    """Name token ids, and which of them are completion: sha256, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for one in data:
        digest.update(json.dumps([one.input_ids, one.completion_mask]).encode())
    return digest.hexdigest()


def gather(tensor: Tensor) -> Tensor:
    """Copy all of a tensor that may be sharded to the CPU; every process must call."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


def share_out(whole: Tensor, like: Tensor) -> Tensor:
    """Move *whole* to the device of *like*, sharded as it is."""
    if not hasattr(like, "device_mesh"):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def random_state() -> dict[str, str]:
    """Return the states of torch's generators as digits; a step draws from no other."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: state.numpy().tobytes().hex() for name, state in states.items()}


def set_random_state(state: dict[str, str]) -> None:
    """Put back what `random_state` gave; a CUDA state is left out on a machine without CUDA."""
    for name, digits in state.items():
        known = torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
        if name == "torch":
            torch.set_rng_state(known)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(known)


class StopRequest:
    """Notes in *asked* that the run is to end after its step; Ctrl-C once more ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._first_s = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are noted; outside the main thread nothing is changed."""
        here = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if here else ()
        before = {one: signal.signal(one, self._note) for one in signals}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first_s = True, now
            if os.environ.get("RANK", "0") == "0":
                log.warning("stopping after this step; Ctrl-C once more stops at once, unsaved")
        elif number == signal.SIGINT and now - self._first_s > _ECHO_S:
            raise KeyboardInterrupt


def _force_to_disk(path: Path) -> None:
    if os.name == "nt":  # Windows opens no directories, and forces no file that is open to read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
