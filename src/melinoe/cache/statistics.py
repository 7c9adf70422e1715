"""
Counts of each expert's choices, without their order; kept as JSON.

They are enough for popularity (the policy ``static``, a prefetch of the popular), but not to replay
a cache.
"""

import json
import os
from pathlib import Path

import numpy as np

from melinoe.cache.locality import popularity
from melinoe.cache.trace import Trace, write_file
from melinoe.errors import TraceError

FORMAT, VERSION = "melinoe-expert-statistics", 1


def save_statistics(
    path: str | os.PathLike, counts: np.ndarray, *, model: str = "", note: str = ""
) -> None:
    """Write counts (layers, num_experts) as JSON; *model* and *note* are for people."""
    record = {"format": FORMAT, "version": VERSION, "model": model, "note": note}
    record["counts"] = [[float(value) for value in row] for row in counts]
    write_file(path, (json.dumps(record) + "\n").encode(), "statistics")


def load_counts(path: str | os.PathLike, trace: Trace | None = None) -> np.ndarray:
    """
    Popularity from a statistics file, or counted from a trace file; told apart by their contents.

    Returns:
        float64 (layers, num_experts).

    Raises:
        TraceError: it is neither, or of another model's shape than *trace*.
    """
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise TraceError(
            f"the statistics {path} cannot be read: {error.strerror}; check the path"
        ) from error
    counts = popularity(Trace.load(path)) if blob[:1] != b"{" else _counts(path, blob)
    if trace is not None and counts.shape != (trace.num_layers, trace.num_experts):
        raise TraceError(
            "{} is of another model: it has {} layers of {} experts, and the trace {} of {}; "
            "count this model's".format(path, *counts.shape, trace.num_layers, trace.num_experts)
        )
    return counts.astype(np.float64)


def _counts(path: str | os.PathLike, blob: bytes) -> np.ndarray:
    try:
        record = json.loads(blob)
        if record.get("format") != FORMAT:
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
