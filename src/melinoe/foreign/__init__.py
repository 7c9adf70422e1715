"""Read traces and statistics that other tools wrote: a trace, if the order of tokens is known."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from melinoe.cache.locality import popularity
from melinoe.cache.trace import Trace
from melinoe.errors import TraceError
from melinoe.foreign.tables import SUFFIXES, read_table

__all__ = ["FORMATS", "Imported", "read_foreign"]

FORMATS = ("auto", "table", "sglang", "llama.cpp")
_BY_SUFFIX = dict.fromkeys(SUFFIXES, "table") | {".pt": "sglang", ".gguf": "llama.cpp"}


@dataclass(frozen=True)
class Imported:
    """Contents of a file."""

    format: str  # one of `FORMATS`
    trace: Trace | None  # None where the file has no order
    counts: np.ndarray  # choices, float64 (layers, num_experts)
    notes: list[str] = field(default_factory=list)  # assumptions and omissions, for people


def read_foreign(
    path: str | os.PathLike,
    format: str = "auto",
    *,
    num_experts: int | None = None,
    model: str = "",
    statistics: bool = False,
) -> Imported:
    """
    Read a file of another tool.

    Args:
        path: The file.
        format: One of `FORMATS`; ``auto`` goes by the suffix.
        num_experts: Experts of each layer, if the file does not say.
        model: For people.
        statistics: Count choices in an unknown order, rather than refuse them.

    Raises:
        TraceError: a file that cannot be read as one, or contradicts *num_experts*.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not Path(path).is_file():
        raise TraceError(f"{path} is no file; check the path")
    if format == "auto":
        suffix = Path(str(path).removesuffix(".gz")).suffix
        if suffix not in _BY_SUFFIX:
            raise TraceError(
                f"what {path} is cannot be told from its name; give it one that ends in "
                f"{', '.join(_BY_SUFFIX)}, or say which it is with --format"
            )
        format = _BY_SUFFIX[suffix]
    found: Trace | np.ndarray
    notes: list[str] = []
    if format == "table":
        found, notes = read_table(path, num_experts, model, statistics)
    elif format == "sglang":
        from melinoe.foreign.sglang import read_sglang

        found = read_sglang(path, model, statistics)
    else:
        from melinoe.foreign.llamacpp import read_imatrix

        found = read_imatrix(path)
    experts = found.num_experts if isinstance(found, Trace) else found.shape[1]
    if num_experts not in (None, experts):
        raise TraceError(
            f"{path} is of a model of {experts} experts a layer, not {num_experts}; leave "
            "--num-experts out"
        )
    if isinstance(found, Trace):
        return Imported(format, found, popularity(found).astype(np.float64), notes)
    return Imported(format, None, found, notes)
