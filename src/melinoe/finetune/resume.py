"""
Let a run that ended early go on bit for bit: its checkpoints, what they must agree in, its signals.

    DIR/step-000120/
        parts.safetensors       what is trained, by parameter name
        best.safetensors        the same at the best measurement, where that is kept
        optimizer.safetensors   the optimizer's state, "<name of state>:<parameter>"
        run.safetensors         random states, and terms summed up for the next log row
        trainer_state.json      of transformers' Trainer
        state.json              schedule, log rows, counts, callbacks; and of every other file its
                                size and SHA-256

A checkpoint is written under another name, forced to the disk, and renamed in one step. One that is
torn all the same (a crash of the machine, a bad disk, a careless hand) is recognised by its sums
and passed over in favour of the one before. Frozen weights are never in it; nothing is pickled.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from melinoe.checkpoint.verifying import sum_of
from melinoe.checkpoint.writing import reason_of
from melinoe.config import FinetuneSettings
from melinoe.config.likeness import gone_settings
from melinoe.data import Encoded
from melinoe.errors import TrainingError, WriteError
from melinoe.whole_file import remove_unfinished, unfinished

log = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})$")
_KEPT = 2  # newest checkpoints that stay
_TWISTER = 624  # words of the generator that Python and NumPy share
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_S = 1.0  # a launcher passes on the Ctrl-C that the terminal has sent to every process itself

# Settings that may be others when a run goes on: they change no number of its curve, or are
# accounted for by the rows of a step.
_FREE = (
    "log_every",
    "eval_every",
    "save_every",
    "save",
    "report_to",
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
)


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    more: bool = False,
) -> Path:
    """
    Write the checkpoint of *step*, and delete all but the newest two.

    Args:
        directory: Of the run; is made.
        step: Optimiser steps done; a checkpoint of the same step is replaced.
        tensors: File name without its ending to tensors by name; files without any are left out.
        state: For ``state.json``; a JSON object.
        texts: Further file names and what to write into them.
        more: Let one more stay.

    Raises:
        WriteError: a full disk, or any other reason; the checkpoints before are as they were.
    """
    path = directory / f"step-{step:06d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with unfinished(path) as temporary:
            for name, group in tensors.items():
                if group:
                    save_file(
                        {k: v.contiguous() for k, v in group.items()}, temporary / _file(name)
                    )
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
            files = {one.name: sum_of(one) for one in sorted(temporary.iterdir())}
            whole = {"format": FORMAT, "step": step, "files": files, **state}
            text = json.dumps(whole, indent=1, allow_nan=False)
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
    for old in list_checkpoints(directory)[_KEPT + more :]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """List a run's checkpoints, newest first, whole or not."""
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), one) for one in directory.iterdir() if (match := _NAME.search(one.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(directory: Path) -> Path | None:
    """Find the newest whole checkpoint of a run; name torn ones in warnings and pass them over."""
    for path in list_checkpoints(directory):
        problem = find_damage(path)
        if problem is None:
            return path
        log.warning("%s is torn (%s), so the one before it is taken", path, problem)
    return None


def find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, or ``None``. Cost: all of it is read once."""
    try:
        state = read_state(path)
        if state["format"] > FORMAT:
            return f"format {state['format']} is of a newer release"
        for name, facts in state["files"].items():
            if sum_of(path / name) != facts:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read the ``state.json`` of a checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read one group of tensors of a checkpoint; empty if it has none of that name."""
    file = path / _file(name)
    # Copied: what is returned is the file, mapped, and would change with it.
    return {key: one.clone() for key, one in load_file(file).items()} if file.is_file() else {}


def remove_checkpoints(directory: Path) -> None:
    """Delete a run's checkpoints, and its directory if nothing else is in it."""
    for path in list_checkpoints(directory):
        shutil.rmtree(path, ignore_errors=True)
    for one in directory.glob(".step-*"):  # of a process that was killed while it wrote
        remove_unfinished(directory / one.name.split(".")[1])
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def identity(
    settings: FinetuneSettings,
    data: Sequence[Encoded],
    rows_per_step: int,
    base: str,
    teacher: str | None = None,
    anchor_text: str | None = None,
) -> dict[str, Any]:
    """Collect, as JSON, what a run must share with the checkpoint that it goes on from."""
    kept = {key: value for key, value in asdict(settings).items() if key not in _FREE}
    return {
        **json.loads(json.dumps(kept)),
        "rows_per_step": rows_per_step,
        "data": data_fingerprint(data),
        "base": base,
        "teacher": teacher,
        "anchor_text": anchor_text,
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
    _check_gone(path, theirs)
    differ = [key for key in ours if theirs.get(key) != ours[key]]
    if not differ:
        return
    named = ", ".join(
        key
        if key in ("data", "base", "teacher", "anchor_text")
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
    _check_gone(path, recorded)
    now = {k: v for k, v in settings.deciding().items() if k not in _FREE}
    differ = [key for key in now if recorded.get(key, now[key]) != now[key]]
    if differ:
        named = ", ".join(f"{key} {recorded[key]} there and {now[key]} here" for key in differ)
        raise TrainingError(
            f"{path} is a run with other settings ({named}); give what it was given, or delete it"
        )


def _check_gone(path: Path, recorded: Mapping[str, Any]) -> None:
    if gone := gone_settings(recorded):
        named = ", ".join(f"{key} {value}" for key, value in gone.items())
        raise TrainingError(
            f"{path} is of a run with settings that this release no longer has ({named}); go on "
            "with the release that began it, or delete it"
        )


def gather(tensor: Tensor) -> Tensor:
    """Copy all of a tensor that may be sharded to the CPU; every process must call."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Copy all of a tensor into one that may be sharded."""
    parameter.copy_(share_out(whole, parameter))


def share_out(whole: Tensor, like: Tensor) -> Tensor:
    """Move *whole* to the device of *like*, sharded as it is."""
    if not hasattr(like, "device_mesh"):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def random_state() -> Tensor:
    """
    Pack the states of Python, NumPy, torch and, if there is one, the CUDA device: int64 ``(n,)``.

    The same length on every process of a run, so that it can be gathered.
    """
    _, words, spare = random.getstate()
    _, keys, position, has_spare, cached = np.random.get_state()
    parts = [
        torch.tensor(words),
        _bits(spare),
        torch.from_numpy(np.asarray(keys).astype(np.int64)),
        torch.tensor([int(position), int(has_spare)]),
        _bits(float(cached)),
        torch.get_rng_state().view(torch.int64),
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_rng_state().view(torch.int64))
    return torch.cat(parts)


def set_random_state(state: Tensor) -> None:
    """Put back what `random_state` gave; a CUDA state is left out on a machine without CUDA."""
    sizes = [_TWISTER + 1, 2, _TWISTER, 2, 2, torch.get_rng_state().numel() // 8]
    words, spare, keys, place, cached, cpu, cuda = state.cpu().split(
        [*sizes, state.numel() - sum(sizes)]
    )
    random.setstate((3, tuple(words.tolist()), _number(spare)))
    position, has_spare = place.tolist()
    numpy_keys = keys.numpy().astype(np.uint32)
    np.random.set_state(("MT19937", numpy_keys, position, has_spare, _number(cached) or 0.0))
    # A copy of its own: torch reads a generator's state from the start of the storage.
    torch.set_rng_state(cpu.clone().view(torch.uint8))
    if cuda.numel() and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda.clone().view(torch.uint8))


def _bits(number: float | None) -> Tensor:
    """A flag that there is a number, and its bits."""
    value = torch.tensor([0.0 if number is None else number], dtype=torch.float64)
    return torch.cat([torch.tensor([int(number is not None)]), value.view(torch.int64)])


def _number(bits: Tensor) -> float | None:
    return float(bits[1:].clone().view(torch.float64)) if bits[0] else None


class StopRequest:
    """
    Notes that the run is asked to stop (Ctrl-C, a scheduler's SIGTERM), to end after its step.

    Attributes:
        asked: Set by the first signal. A second Ctrl-C ends the process at once; a scheduler's
            SIGTERM may come as often as it likes, and is followed by a SIGKILL in the end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first_s = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are noted; outside the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[signal.Signals, Any] = {one: signal.getsignal(one) for one in _SIGNALS}
        for one in _SIGNALS:
            signal.signal(one, self._note)
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


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _force_to_disk(path: Path) -> None:
    if os.name == "nt":  # Windows opens no directories, and forces no file that is open to read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
