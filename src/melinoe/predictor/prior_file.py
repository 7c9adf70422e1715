"""The file a prior is kept in: safetensors, its keys and settings as JSON in the metadata."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from melinoe.cache.tensor_file import parse_tensors
from melinoe.errors import CheckpointError, DataError, WriteError

FORMAT, VERSION = "melinoe-prior", 1
TABLES = ("total", "expected", "weight")


@dataclass(frozen=True)
class PriorContents:
    """
    What a file holds.

    Attributes:
        fingerprint: Of the model.
        half_life, strength, max_keys: As in `melinoe.predictor.PriorSettings`.
        keys: The longest unused first.
        total: ``(keys, layers, experts)``, sums of shares that were used.
        expected: The same of what was predicted.
        weight: ``(keys, layers)``, how many requests those are.
    """

    fingerprint: str
    half_life: float
    strength: float
    max_keys: int
    keys: list[str]
    total: np.ndarray
    expected: np.ndarray
    weight: np.ndarray


def write_prior(path: str | Path, contents: PriorContents) -> None:
    """
    Write a file that appears whole or not at all.

    Raises:
        WriteError: the place cannot be written to.
    """
    header = {
        "version": VERSION,
        "fingerprint": contents.fingerprint,
        "half_life": contents.half_life,
        "strength": contents.strength,
        "max_keys": contents.max_keys,
        "keys": contents.keys,
    }
    arrays = {name: np.ascontiguousarray(getattr(contents, name), np.float32) for name in TABLES}
    blob = save_tensors(arrays, metadata={"format": FORMAT, "header": json.dumps(header)})
    target, temporary = Path(path), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Readable by its owner alone, as temporary files are: it says who used the service.
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise WriteError(
            f"the prior cannot be written to {target} ({error.strerror}); choose another place"
        ) from error


def read_prior(path: str | Path) -> PriorContents:
    """
    Read what `write_prior` wrote, and check all of it.

    Raises:
        DataError: there is no such file.
        CheckpointError: it is torn, no prior, or of another version.
    """
    way_out = "remove it, and begin another one"
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            f"the prior {path} cannot be read ({error.strerror}); check the path"
        ) from None
    try:
        arrays, metadata = parse_tensors(blob)
        if metadata.get("format") != FORMAT:
            raise ValueError("it is a file of another kind")
        header = json.loads(metadata["header"])
        if header["version"] != VERSION:
            raise CheckpointError(
                f"the prior {path} is of version {header['version']!r} and this melinoe reads "
                f"{VERSION}; {way_out}"
            )
        return _checked(header, arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the prior {path} is malformed ({error}); {way_out}") from error


def _checked(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> PriorContents:
    """What a file says, if it is consistent; ValueError says what is not."""
    if arrays.keys() != set(TABLES):
        raise ValueError(f"it holds {', '.join(sorted(arrays)) or 'nothing'}")
    keys, (total, expected, weight) = header["keys"], (arrays[name] for name in TABLES)
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise ValueError("its keys are no list of words")
    if len(set(keys)) != len(keys) or len(keys) > header["max_keys"]:
        raise ValueError("a key occurs twice, or there are more than it may hold")
    shapes = (total.shape, total.shape[:2])
    if total.ndim != 3 or (expected.shape, weight.shape) != shapes or len(total) != len(keys):
        raise ValueError("its tables do not fit its keys")
    if total.shape[1] < 1 or total.shape[2] < 1:
        raise ValueError("it knows no experts")
    if any(table.dtype != np.float32 for table in arrays.values()):
        raise ValueError("its tables are of another type")
    for table in (total, expected, weight):
        if not np.isfinite(table).all() or (table < 0).any():
            raise ValueError("a use is negative or no number")
    if not isinstance(header["fingerprint"], str):
        raise ValueError("it names no model")
    for name in ("half_life", "strength"):
        value = header[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"its {name} is no number")
        if not 0 < value < float("inf"):
            raise ValueError(f"its {name} is {value}")
    if type(header["max_keys"]) is not int or header["max_keys"] < 1:
        raise ValueError("its max_keys is no number of 1 or more")
    return PriorContents(
        header["fingerprint"],
        float(header["half_life"]),
        float(header["strength"]),
        header["max_keys"],
        keys,
        total,
        expected,
        weight,
    )
