"""
The file a trace is kept in: safetensors, the header as JSON in its metadata.

A file that is torn, of another version or of other contents is refused, never read as far as it
goes.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save as save_tensors

from melinoe.cache.tensor_file import FileKind
from melinoe.errors import TraceError
from melinoe.whole_file import write_whole as write_file

FORMAT = "melinoe-trace"
# The lowest that has what is in it, for older readers: 1, with scores 2, with guesses 3.
VERSIONS = (1, 2, 3)
ARRAYS = {"experts": np.int16, "forward": np.int32, "sequence": np.int32, "kind": np.uint8}
HEADER: dict[str, type] = {
    "model": str,
    "fingerprint": str,
    "num_experts": int,
    "top_k": int,
    "versions": dict,
    "note": str,
}
_KIND = FileKind(
    FORMAT, VERSIONS, "the trace {} is", "trace", "record one with `melinoe trace`", TraceError
)


def write_trace_file(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]
) -> None:
    """
    Write arrays and header; the file appears whole or not at all, one already there is replaced.

    Raises:
        TraceError: the place cannot be written to.
    """
    version = 3 if "guesses" in arrays else 2 if "scores" in arrays else 1
    metadata = {"format": FORMAT, "header": json.dumps({"version": version, **header})}
    blob = save_tensors(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=metadata
    )
    write_whole(path, blob, "trace")


def write_whole(path: str | os.PathLike, blob: bytes, what: str) -> None:
    """
    Write a file that appears whole or not at all; one already there is replaced.

    Raises:
        TraceError: the place cannot be written to; *what* is the word for it in the message.
    """
    try:
        write_file(path, blob)
    except OSError as error:
        raise TraceError(
            f"the {what} cannot be written to {path}: {error.strerror}; choose another place"
        ) from error


def read_trace_file(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """
    Read arrays and header, exactly those that the format has; their contents are not checked.

    Raises:
        TraceError: the file is missing, torn, no trace, or of another version.
    """
    arrays, header, version = _KIND.read(path)
    if {name: type(value) for name, value in header.items()} != HEADER:
        raise TraceError(
            f"the trace {path} is malformed: its header does not hold {', '.join(HEADER)}; "
            "record it again"
        )
    wanted = {*ARRAYS, *({"scores"} if version == 2 else {"guesses"} if version == 3 else ())}
    if arrays.keys() != wanted | ({"scores"} & arrays.keys() if version == 3 else set()):
        raise TraceError(
            f"the trace {path} is malformed: it holds {', '.join(sorted(arrays))} instead of "
            f"{', '.join(sorted(wanted))}; record it again"
        )
    return arrays, header
