"""Read the columns of a table (CSV, Parquet, JSON lines, arrays), and exact numbers out of them."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.errors import TraceError

SUFFIXES = (".csv", ".parquet", ".jsonl", ".ndjson", ".npz", ".npy")
MOST = np.iinfo(np.int32).max
_CHOICES = ("experts", "expert_ids", "topk_ids", "selected_experts")


def read_columns(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read a table.

    Args:
        path: ``.csv`` with a header line, ``.jsonl``, one object a line (both also gzipped, with
            ``.gz`` behind the name), ``.parquet``, or ``.npz`` and ``.npy`` as `_of_arrays` says.

    Returns:
        Arrow arrays by the name of the column, as the file has it.

    Raises:
        TraceError: another suffix, the file cannot be read, or it names a column twice.
    """
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    kind = Path(str(path).removesuffix(".gz")).suffix
    if kind not in SUFFIXES:
        raise TraceError(f"{path} is not one of {', '.join(SUFFIXES)}; name a table so")
    try:
        if kind in (".npz", ".npy"):
            return _of_arrays(path)
        if kind == ".parquet":
            table = parquet.read_table(path)
        else:
            with pa.input_stream(str(path), compression="detect") as stream:
                blob = pa.py_buffer(stream.read().removeprefix(b"\xef\xbb\xbf"))
            if kind == ".csv":
                table = csv.read_csv(pa.BufferReader(blob))
            else:
                # A block must hold the longest line.
                block = json.ReadOptions(block_size=1 << 26)
                table = json.read_json(pa.BufferReader(blob), read_options=block)
        twice = {name for name in table.column_names if table.column_names.count(name) > 1}
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    # Arrow's own, and what numpy, zip and texts of another encoding raise.
    except (pa.ArrowException, OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        said = (str(error) or "it is empty").splitlines()[0]
        raise TraceError(f"the table {path} cannot be read ({said}); check the file") from error
    if twice:
        raise TraceError(f"the table {path} has two columns {min(twice)}; take one out")
    return {
        name: values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        for name, values in columns.items()
    }


def _of_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read arrays as a table whose rows are the layers of each token, in that order.

    The array ``experts``, another name of it or the only one holds integers (tokens, layers, k);
    beside it may stand one number for each token, and ``scores``, shaped as the experts.
    """
    import pyarrow as pa

    with Path(path).open("rb") as file:
        loaded = np.load(file, allow_pickle=False)  # objects are pickles
        arrays = {"experts": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    called = [name for name in arrays if name in _CHOICES] or list(arrays)
    if len(called) != 1:
        raise ValueError(f"which of {', '.join(called)} are the experts? call that experts")
    experts = arrays.pop(called[0])
    if experts.ndim != 3 or not experts.size:
        raise ValueError(f"{called[0]} has the shape {experts.shape}, not (tokens, layers, k)")
    tokens, layers, top_k = experts.shape
    columns = {"token": np.repeat(np.arange(tokens), layers)}
    columns["layer"] = np.tile(np.arange(layers), tokens)
    columns |= {f"expert_{k}": experts[:, :, k].ravel() for k in range(top_k)}
    for name, values in arrays.items():
        if name == "scores" and values.shape == experts.shape:
            columns |= {f"score_{k}": values[:, :, k].ravel() for k in range(top_k)}
        elif values.shape == (tokens,):
            columns[name] = np.repeat(values, layers)
        else:
            raise ValueError(
                f"{name} has the shape {values.shape}, which fits no token; take it out"
            )
    return {name: pa.array(values) for name, values in columns.items()}


def whole(
    name: str,
    values: Any,
    low: int,
    high: int = MOST,
    *,
    missing: int | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """
    Read exact whole numbers.

    Args:
        name: Of the column, for the sentence.
        values: An Arrow array or a numpy one, of integers, of floats that are whole, or of texts
            that spell integers.
        low, high: The least and the greatest allowed.
        missing: Stands for an empty value; without it an empty one is refused.
        rows: Which row each value is of, from 1; absent, they are counted.

    Returns:
        int64, as many as *values*.

    Raises:
        ValueError: a value is none of these; the sentence says which, and of which row.
    """
    empty = np.zeros(len(values), bool)
    if not isinstance(values, np.ndarray):
        if values.null_count:
            empty = values.is_null().to_numpy(zero_copy_only=False)
        values = _filled(values)
    if values.dtype.kind in "iuf":
        # Bounds may lie beyond a small float's.
        numbers = values = values.astype(np.float64) if values.dtype.kind == "f" else values
        good = (values >= low) & (values <= high)
        if values.dtype.kind == "f":  # which holds not every whole number beyond 2^53
            good &= (values == np.floor(values)) & (np.abs(values) <= 2**53)
    else:
        numbers = np.array([_spelled(value) for value in values.tolist()], np.float64)
        good = (numbers >= low) & (numbers <= high)
        empty |= np.array([value == "" for value in values.tolist()], bool)
    good = np.where(empty, missing is not None, good)
    if not good.all():
        at = int(np.argmin(good))
        said = "no" if empty[at] else f"the value {values[at : at + 1].tolist()[0]!r} as its"
        raise ValueError(
            f"row {at + 1 if rows is None else rows[at]} has {said} {name}, which is a whole "
            f"number from {low} to {high}"
        )
    found = np.where(empty, 0, numbers).astype(np.int64)
    found[empty] = 0 if missing is None else missing
    return found


def _filled(values: Any) -> np.ndarray:
    """Arrow's values as numpy has them; something of their type for each that is absent."""
    import pyarrow as pa

    if pa.types.is_null(values.type):
        return np.zeros(len(values), np.int64)
    if values.null_count and (
        pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    ):
        values = values.fill_null(0)
    return values.to_numpy(zero_copy_only=False)


def _spelled(value: Any) -> float:
    """The integer that a text spells in ASCII digits; no number for anything else."""
    text = value.strip() if isinstance(value, str) else ""
    digits = text.removeprefix("-")
    return float(text) if digits.isascii() and digits.isdigit() else math.nan
