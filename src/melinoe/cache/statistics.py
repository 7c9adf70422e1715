"""
Counts of each expert's choices, without their order; kept as JSON.

They are enough for popularity (the policy ``static``, a prefetch of the popular), but not to replay
a cache.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.locality import popularity
from melinoe.cache.tensor_file import write_file
from melinoe.cache.trace import Trace
from melinoe.errors import TraceError

FORMAT, VERSION = "melinoe-expert-statistics", 1


def save_statistics(
    path: str | os.PathLike, counts: np.ndarray, *, model: str = "", note: str = ""
) -> None:
    """
    Write counts as JSON; the file appears whole or not at all.

    Args:
        path: One already there is replaced.
        counts: Choices, (layers, num_experts).
        model, note: For people.

    Raises:
        TraceError: the place cannot be written to.
    """
    record = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "note": note,
        "counts": [[float(value) for value in row] for row in counts],
    }
    write_file(path, (json.dumps(record) + "\n").encode(), "statistics")


def load_statistics(path: str | os.PathLike, trace: Trace) -> np.ndarray:
    """
    Popularity from a statistics file, or counted from a trace file.

    Args:
        path: Either of them; told apart by their contents.
        trace: Of the model that they must fit.

    Returns:
        float64 (layers, num_experts).

    Raises:
        TraceError: it is neither, or of another model's shape.
    """
    counts = load_counts(path)
    shape = (trace.num_layers, trace.num_experts)
    if counts.shape != shape:
        raise TraceError(
            "{} is of another model: it has {} layers of {} experts, and the trace {} of {}; "
            "count this model's".format(path, *counts.shape, *shape)
        )
    return counts


def load_counts(path: str | os.PathLike) -> np.ndarray:
    """
    Load counts as `load_statistics` does, of whatever model.

    Raises:
        TraceError: it is neither.
    """
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise TraceError(
            f"the statistics {path} cannot be read: {error.strerror}; check the path"
        ) from error
    counts = _counts(path, blob) if blob[:1] == b"{" else popularity(Trace.load(path))
    return np.asarray(counts, np.float64)


def _counts(path: str | os.PathLike, blob: bytes) -> np.ndarray:
    try:
        record: Any = json.loads(blob)
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            raise ValueError("it is of another format")
        if record.get("version") != VERSION:
            raise ValueError(f"it has version {record.get('version')!r}, not {VERSION}")
        counts = np.asarray(record["counts"], np.float64)
        if counts.ndim != 2 or not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError("its counts are no table of numbers of 0 or more")
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(
            f"the statistics {path} are malformed ({error}); import them again"
        ) from error
    return counts
