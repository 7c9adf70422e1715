"""
A trace as a table, CSV or Parquet: the form to write when no converter fits.

One row per token and MoE layer, in the order in which tokens were computed, each token's layers
together and ascending:

    token      number of the computed token, from 0, ascending
    layer      MoE layer, from 0; every token has every layer once
    sequence   which prompt the token belongs to, from 0
    kind       prompt, completion or padding; or 0, 1, 2
    expert_0, expert_1, ...   the experts it chose; -1, or empty, where it chose none
    forward    optional: number of the forward pass, from 0, never decreasing
    score_0, score_1, ...     optional: the weight of each choice, as many as experts

Without ``forward`` it is assumed what one user's decoding does: a sequence's prompt is one pass,
and each token of a completion is one of its own. Other columns are refused, not dropped.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.trace import Trace
from melinoe.errors import TraceError
from melinoe.foreign.columns import Columns, whole

KINDS = {"prompt": 0, "completion": 1, "padding": 2}
_REQUIRED = ("token", "layer", "sequence", "kind")


def read_table(
    path: str | os.PathLike, columns: Columns, num_experts: int, model: str = ""
) -> Trace:
    """
    Read a trace from a table.

    Args:
        path: For sentences and the note.
        columns: Of the table, as `melinoe.foreign.columns.read_columns` gives them.
        num_experts: Experts of each layer; a table does not say how many were never chosen.
        model: For people.

    Raises:
        TraceError: it is not the form above; the sentence says what is missing.
    """

    def refuse(fault: str) -> TraceError:
        return TraceError(f"the table {path} is no trace: {fault}; see docs/traces.md for the form")

    missing = [name for name in _REQUIRED if name not in columns]
    top_k = sum(name.startswith("expert_") for name in columns)
    if missing or not top_k:
        raise refuse(f"it has no column {', '.join(missing) or 'expert_0'}")
    scored = any(name.startswith("score_") for name in columns)
    wanted = [f"expert_{k}" for k in range(top_k)] + [f"score_{k}" for k in range(top_k)] * scored
    odd = set(columns).symmetric_difference({*_REQUIRED, *wanted, *columns.keys() & {"forward"}})
    if odd:
        raise refuse(f"its columns do not match at {', '.join(sorted(odd))}")
    rows = len(columns["token"])
    try:
        numbers = {
            name: whole(values) for name, values in columns.items() if name in _whole_columns(top_k)
        }
        kind = np.array([KINDS.get(str(k), k) for k in columns["kind"]]).astype(np.uint8)
        scores = [np.asarray(columns[f"score_{k}"], np.float16) for k in range(top_k * scored)]
    except (TypeError, ValueError, OverflowError) as error:
        raise refuse(f"a value is no number of its column ({error})") from error
    layers = int(numbers["layer"].max(initial=-1)) + 1
    if not rows or rows % layers:
        raise refuse(f"{rows} rows are not every layer of every token")
    place = np.tile(np.arange(layers), rows // layers)
    token = numbers["token"].reshape(-1, layers)
    if (numbers["layer"] != place).any() or (token != token[:, :1]).any():
        raise refuse("its rows are not token by token with the layers of each in order")
    if (np.diff(token[:, 0]) <= 0).any():
        raise refuse("its token numbers do not ascend")
    for name, values in (("sequence", numbers["sequence"]), ("kind", kind)):
        if (values.reshape(-1, layers) != values[::layers, None]).any():
            raise refuse(f"the layers of a token differ in {name}")
    sequence, kind = numbers["sequence"][::layers].astype(np.int32), kind[::layers]
    forward = numbers["forward"][::layers] if "forward" in numbers else _passes(sequence, kind)
    experts = np.stack([numbers[f"expert_{k}"] for k in range(top_k)], axis=-1)
    try:
        return Trace(
            experts=_small(experts, path).reshape(-1, layers, top_k),
            forward=forward.astype(np.int32),
            sequence=sequence,
            kind=kind,
            num_experts=num_experts,
            model=model,
            note=f"imported from {Path(path).name}",
            scores=np.stack(scores, axis=-1).reshape(-1, layers, top_k) if scored else None,
        )
    except TraceError as error:
        raise refuse(str(error).partition(": ")[2].partition(";")[0]) from error


def write_table(trace: Trace, path: str | os.PathLike) -> None:
    """
    Write a trace as a table, the form that `read_table` reads.

    Raises:
        TraceError: a suffix other than ``.csv`` and ``.parquet``, or the place cannot be written.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    rows, layers, top_k = trace.experts.shape
    columns: dict[str, Any] = {
        "token": np.repeat(np.arange(rows), layers),
        "layer": np.tile(np.arange(layers), rows),
        "sequence": np.repeat(trace.sequence, layers),
        "kind": [list(KINDS)[k] for k in np.repeat(trace.kind, layers)],
        "forward": np.repeat(trace.forward, layers),
    }
    for k in range(top_k):
        columns[f"expert_{k}"] = trace.experts[:, :, k].ravel()
    if trace.scores is not None:
        for k in range(top_k):
            columns[f"score_{k}"] = trace.scores[:, :, k].ravel().astype(np.float32)
    path = Path(path)
    write = {".csv": csv.write_csv, ".parquet": parquet.write_table}.get(path.suffix)
    if write is None:
        raise TraceError(f"{path} is neither .csv nor .parquet; name one of them")
    temporary = path.with_name(f".{path.name}.writing")
    try:
        write(pa.table(columns), temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise TraceError(
            f"the table cannot be written to {path}: {error.strerror}; choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _whole_columns(top_k: int) -> set[str]:
    return {"token", "layer", "sequence", "forward", *(f"expert_{k}" for k in range(top_k))}


def _small(experts: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Ids as int16; those that do not fit would wrap round."""
    limits = np.iinfo(np.int16)
    if experts.size and (experts.min() < limits.min or experts.max() > limits.max):
        raise TraceError(f"the table {path} names expert {experts.max()}, beyond any model's")
    return experts.astype(np.int16)


def _passes(sequence: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """Prompts in one pass, completions token by token."""
    new = np.ones(len(sequence), bool)
    new[1:] = (sequence[1:] != sequence[:-1]) | (kind[1:] == 1) | (kind[:-1] == 1)
    return np.cumsum(new) - 1
