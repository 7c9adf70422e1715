"""
Read llama.cpp's importance matrix in GGUF: how often each expert was used.

``llama-imatrix`` writes it by default since mid-2025. Of a tensor of experts, such as
``blk.3.ffn_down_exps.weight``, ``....counts``, float32 (experts, 1), holds the tokens routed to
each: popularity on the calibration text, without an order. The older ``.dat`` form has one number
per tensor, not per expert; it is refused, and so is a GGUF file that was converted from it.
"""

import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from melinoe.errors import TraceError

_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps\.weight\.counts")
# GGUF's types of metadata values by number, and how many bytes each takes.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32, _FLOAT32 = 8, 9, 4, 0
_LONGEST = 1 << 30


def read_imatrix(path: str | os.PathLike) -> np.ndarray:
    """
    Read how often each expert was used.

    Returns:
        Counts, float64 (layers, num_experts); dense layers are left out.

    Raises:
        TraceError: another file, a torn one, the old form, or a model without experts.
    """
    try:
        with Path(path).open("rb") as file:
            found = _counts(path, file)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (ValueError, TypeError, RecursionError, struct.error, OverflowError) as error:
        raise TraceError(
            f"{path} is a torn GGUF file, or none that is known ({error}); make it again"
        ) from error
    sizes = sorted({len(row) for row in found.values()})
    wrong = None
    if not sizes:
        wrong = "counts no experts; make it from an MoE model"
    elif 1 in sizes:
        wrong = (
            "has one number for all experts of a layer, as one converted from the older .dat form; "
            "make it again with llama-imatrix"
        )
    elif len(sizes) > 1:
        wrong = (
            f"is of layers with {' and '.join(map(str, sizes))} experts, and statistics are of "
            "layers alike; use a model whose layers are"
        )
    if wrong is not None:
        raise TraceError(f"the importance matrix {path} {wrong}")
    return np.stack([found[layer] for layer in sorted(found)]).astype(np.float64)


def _counts(path: str | os.PathLike, file: BinaryIO) -> dict[int, np.ndarray]:
    """Counts by layer: the header, then the tensors of experts that it names."""
    if file.read(4) != b"GGUF":
        raise TraceError(
            f"{path} is no GGUF file; the older .dat form does not count experts, so write "
            "it with `llama-imatrix --output-format gguf`"
        )
    if (version := _number(file, "I")) not in (2, 3):
        raise ValueError(f"GGUF version {version}")
    num_tensors, num_entries = _number(file, "Q"), _number(file, "Q")
    if max(num_tensors, num_entries) > 1 << 20:
        raise ValueError("more entries than any model has")
    metadata = {_text(file): _value(file, _number(file, "I")) for _ in range(num_entries)}
    if (kind := metadata.get("general.type")) != "imatrix":
        raise TraceError(
            f"{path} is a GGUF file of type {kind!r}, not an importance matrix; make one with "
            "llama-imatrix"
        )
    tensors = []
    for _ in range(num_tensors):
        name = _text(file)
        shape = [_number(file, "Q") for _ in range(_number(file, "I"))]
        tensors.append((name, math.prod(shape), _number(file, "I"), _number(file, "Q")))
    alignment = metadata.get("general.alignment") or 32
    start = -(-file.tell() // alignment) * alignment
    found: dict[int, np.ndarray] = {}
    for name, size, kind, offset in tensors:
        match = _EXPERTS.fullmatch(name)
        if match is None or int(match[1]) in found:
            continue  # a layer's tensors count the same tokens
        if kind != _FLOAT32:
            raise ValueError(f"{name} is not float32")
        file.seek(start + offset)
        counts = np.frombuffer(_take(file, 4 * size), "<f4")
        if not (np.isfinite(counts) & (counts >= 0)).all():
            raise ValueError(f"{name} holds what counts nothing")
        found[int(match[1])] = counts
    return found


def _take(file: BinaryIO, size: int) -> bytes:
    if not 0 <= size <= _LONGEST:
        raise ValueError(f"it asks for {size} bytes at once")
    blob = file.read(size)
    if len(blob) < size:
        raise ValueError("it ends too early")
    return blob


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack("<" + code, _take(file, struct.calcsize(code)))[0]


def _text(file: BinaryIO) -> str:
    return _take(file, _number(file, "Q")).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    """Read one value of the metadata; only texts and the alignment are kept."""
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        if count > 1 << 24:
            raise ValueError("an array longer than any file's")
        for _ in range(count):
            _value(file, inner)
        return None
    if kind not in _SIZES:
        raise ValueError(f"unknown type {kind}")
    blob = _take(file, _SIZES[kind])
    return int.from_bytes(blob, "little") if kind == _UINT32 else None
