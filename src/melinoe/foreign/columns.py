"""The columns of a CSV or Parquet file, and whole numbers out of them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.errors import TraceError

Columns = Mapping[str, Sequence[Any]]


def read_columns(path: str | os.PathLike) -> Columns:
    """
    Read a table.

    Args:
        path: ``.csv`` with a header line, or ``.parquet``.

    Raises:
        TraceError: another suffix, or the file cannot be read.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    read = {".csv": csv.read_csv, ".parquet": parquet.read_table}.get(Path(path).suffix)
    if read is None:
        raise TraceError(f"{path} is neither .csv nor .parquet; name a table, or its --format")
    try:
        table = read(path)
    except (OSError, pa.ArrowException) as error:
        said = str(error).splitlines()[0]
        raise TraceError(f"the table {path} cannot be read ({said}); check the file") from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def whole(values: Sequence[Any]) -> np.ndarray:
    """
    Whole numbers as int64; an empty one is -1.

    Raises:
        ValueError, TypeError: a value is none.
    """
    numbers = np.array([-1 if value in (None, "") else value for value in values], np.float64)
    if (numbers != np.floor(numbers)).any():
        raise ValueError("a fraction where a whole number belongs")
    return numbers.astype(np.int64)
