"""
Checkpoints of a run on its way: directories of safetensors and JSON, whole or not there.

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

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from melinoe.checkpoint.verifying import sum_of
from melinoe.checkpoint.writing import reason_of
from melinoe.errors import WriteError
from melinoe.whole_file import remove_unfinished, unfinished

log = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})$")


def write_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    keep: int,
) -> Path:
    """
    Write the checkpoint of *step*, and delete the oldest beyond *keep*.

    Args:
        directory: Of the run; is made.
        step: Optimiser steps done; a checkpoint of the same step is replaced.
        tensors: File name without its ending to tensors by name; files without any are left out.
        state: For ``state.json``; a JSON object.
        texts: Further file names and what to write into them.
        keep: Newest checkpoints that stay.

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
    for old in list_checkpoints(directory)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints of a run, newest first, whole or not."""
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), one) for one in directory.iterdir() if (match := _NAME.search(one.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run; torn ones are named in warnings and passed over."""
    for path in list_checkpoints(directory):
        problem = find_damage(path)
        if problem is None:
            return path
        log.warning("%s is torn (%s), so the one before it is taken", path, problem)
    return None


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or ``None``. Cost: all of it is read once."""
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
    """The ``state.json`` of a checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """One group of tensors of a checkpoint, in memory; empty if it has none of that name."""
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
