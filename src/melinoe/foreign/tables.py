"""
Tables of choices, as people and tools write them: CSV, Parquet or JSON lines.

A row is a token in one layer, with all its choices, or a single choice; docs/traces.md lists the
columns. A table that has no token is no trace but statistics: how often each expert was chosen.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.trace import Trace
from melinoe.errors import TraceError
from melinoe.foreign.columns import read_columns, whole
from melinoe.foreign.rows import Rows, counts_of, gathered, trace_of

# What a column is called here, and how others spell it.
_SPELLINGS = {
    "token": "token_idx token_index token_pos position pos",
    "layer": "layer_id layer_idx layer_index layer_num moe_layer",
    "expert": "expert_id expert_idx expert_index",
    "experts": "expert_ids topk_ids topk_idx topk_indices top_k_index selected_experts",
    "score": "weight prob probability router_weight expert_weight gate_weight",
    "scores": "weights topk_weights topk_scores router_weights expert_weights",
    "rank": "k slot choice",
    "sequence": "sequence_id seq seq_id req_id request request_id prompt_id sample_id",
    "kind": "phase",
    "forward": "forward_id forward_pass step step_id iteration",
    "count": "counts frequency",
}
_NAMES = {other: name for name, others in _SPELLINGS.items() for other in others.split()}
_OF_ONE = re.compile(r"(expert|score)_\d+")
_OF_LOG = ("model_id", "num_experts")
_KINDS = {"prompt": 0, "completion": 1, "padding": 2, "prefill": 0, "decode": 1}
_KINDS |= {"0": 0, "1": 1, "2": 2}


def read_table(
    path: str | os.PathLike, num_experts: int | None, model: str, statistics: bool
) -> tuple[Trace | np.ndarray, list[str]]:
    """
    Read a trace, or statistics where the table has no order or no more is wanted.

    Args:
        path: The table.
        num_experts: Experts of each layer; absent, as the table's header line says.
        model: For people; absent, likewise.
        statistics: Counts are enough.

    Returns:
        The trace, or counts, float64 (layers, num_experts); and what was assumed or left out.

    Raises:
        TraceError: the table is neither; the sentence says why, and what would work.
    """
    notes: list[str] = []
    columns = read_columns(path)
    try:
        columns, told = _without_header_lines(_known(columns, notes))
        experts = num_experts or told.get("num_experts")
        if not isinstance(experts, int):
            raise ValueError("it does not say how many experts a layer has; give --num-experts")
        rows = _rows(columns, experts)
        if "token" not in rows and "scores" in rows:
            notes.append("weights left out: every choice counts one")
        if statistics or "token" not in rows:
            return counts_of(rows, experts, notes), notes
        model = model or str(told.get("model_id", ""))
        return trace_of(rows, experts, model, f"imported from {Path(path).name}", notes), notes
    except (ValueError, NotImplementedError, TraceError) as error:  # Arrow's, of nested columns
        raise TraceError(
            f"the table {path} cannot be imported: {error}; docs/traces.md has the forms"
        ) from error


def _known(columns: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Columns by the names used here; others are left out, which *notes* then say."""
    ours = {}
    for given in columns:
        name = given.strip().lower().replace(" ", "_")
        ours[given] = _NAMES.get(name, name)
    for name, times in Counter(ours.values()).items():
        if times > 1:
            raise ValueError(f"it has two columns for the {name}; take one out")
    known = {*_SPELLINGS, *_OF_LOG}
    found = {
        name: columns[given]
        for given, name in ours.items()
        if name in known or _OF_ONE.fullmatch(name)
    }
    if "layer" not in found or not _of_choices(found):
        raise ValueError(
            f"it has no column {'expert' if 'layer' in found else 'layer'}, but "
            f"{', '.join(columns) or 'none at all'}"
        )
    if odd := [given for given, name in ours.items() if name not in found]:
        notes.append(f"columns left out: {', '.join(odd)}")
    return found


def _of_choices(columns: dict[str, Any]) -> list[str]:
    """Columns that say which experts were chosen."""
    return [name for name in columns if re.fullmatch(r"experts?|expert_\d+", name)]


def _without_header_lines(columns: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take out lines that have neither layer nor choice but tell of the log; and what they tell."""
    import pyarrow.compute as pc

    chosen = _of_choices(columns)[0]
    header = pc.and_(columns["layer"].is_null(), columns[chosen].is_null())
    told: dict[str, Any] = {}
    for name in set(_OF_LOG) & columns.keys():
        values = columns.pop(name).filter(header).drop_null()
        told |= {name: values[0].as_py()} if len(values) else {}
    kept = np.flatnonzero(~header.to_numpy(zero_copy_only=False))
    rows = {name: values.take(kept) for name, values in columns.items()}
    # A column of header lines alone is none of the rows'.
    kept_empty = ("layer", chosen)
    rows = {
        name: values
        for name, values in rows.items()
        if values.null_count < len(values) or name in kept_empty or _OF_ONE.fullmatch(name)
    }
    return rows | {"number": kept + 1}, told


def _rows(columns: dict[str, Any], num_experts: int) -> Rows:
    """Exact numbers of each column, with all choices of a token and layer in one row."""
    number = columns["number"]
    if not len(number):
        raise ValueError("it has no rows")
    rows: Rows = {"number": number}
    for name in ("token", "layer", "forward", "count", "rank"):
        if name in columns:
            rows[name] = whole(name, columns[name], 0, rows=number)
    if "sequence" in columns:
        rows["sequence"] = _numbered(columns["sequence"], number)
    if "kind" in columns:
        rows["kind"] = _kinds(columns["kind"], number)
    rows["experts"] = _matrix("expert", columns, number, num_experts - 1)
    if {"score", "scores", "score_0"} & columns.keys():
        rows["scores"] = _matrix("score", columns, number, None)
        if rows["scores"].shape != rows["experts"].shape:
            raise ValueError("it has not one weight for each choice of an expert")
        lacks = (np.isnan(rows["scores"]) & (rows["experts"] >= 0)).any(axis=1)
        if lacks.any():
            raise ValueError(f"row {number[np.argmax(lacks)]} has a choice without its weight")
    if {"token", "count"} <= rows.keys():
        raise ValueError("it has both tokens and counts; take one of the columns out")
    return gathered(rows) if "token" in rows and "expert" in columns else rows


def _numbered(names: Any, number: np.ndarray) -> np.ndarray:
    """Sequences, which are numbers or texts, numbered from 0 as they first appear."""
    import pyarrow as pa

    if not pa.types.is_string(names.type):
        names = pa.array(whole("sequence", names, 0, np.iinfo(np.int64).max, rows=number))
    codes = names.dictionary_encode().indices
    if codes.null_count:
        raise ValueError(f"row {number[np.argmax(codes.is_null())]} has no sequence")
    return codes.to_numpy().astype(np.int64)


def _kinds(words: Any, number: np.ndarray) -> np.ndarray:
    """Kinds of rows, which are words or numbers, uint8."""
    coded = words.dictionary_encode()
    spelled = [_KINDS.get(word, word) for word in coded.dictionary.to_pylist()]
    good = [kind in (0, 1, 2) and not isinstance(kind, bool) for kind in spelled]
    codes = coded.indices.fill_null(len(spelled)).to_numpy()
    bad = ~np.array([*good, False])[codes]
    if bad.any():
        at = int(np.argmax(bad))
        raise ValueError(
            f"row {number[at]} has the kind {words[at].as_py()!r}; write prompt, completion or "
            "padding, or 0, 1 or 2"
        )
    return np.array([*spelled, 0], np.uint8)[codes]


def _matrix(one: str, columns: dict[str, Any], number: np.ndarray, most: int | None) -> np.ndarray:
    """Experts, int64 (rows, k), -1 for none; or weights (*most* is None), float16, nan."""
    import pyarrow.compute as pc

    if f"{one}s" in columns:
        lists = columns[f"{one}s"]
        if "list" not in str(lists.type):
            raise ValueError(f"its column of {one}s holds no lists")
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
        row = np.repeat(np.arange(len(number)), lengths)
        place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        values = _values(one, pc.list_flatten(lists), number[row], most, True)
        width, none = max(1, lengths.max()), np.nan if most is None else -1
        matrix = np.full((len(number), width), none, values.dtype)
        matrix[row, place] = values
        return matrix
    names = [name for name in columns if re.fullmatch(rf"{one}_\d+", name)]
    wanted = [one] if one in columns else [f"{one}_{k}" for k in range(len(names))]
    if odd := set(names).symmetric_difference(wanted) - {one}:
        raise ValueError(f"its columns do not match at {', '.join(sorted(odd))}")
    ordered = "token" in columns
    each = [_values(name, columns[name], number, most, ordered) for name in wanted]
    return np.stack(each, axis=-1)


def _values(
    name: str, values: Any, number: np.ndarray, most: int | None, ordered: bool
) -> np.ndarray:
    """One column of choices, or of weights."""
    import pyarrow as pa

    if most is not None:
        least = -1 if ordered else 0  # without an order, a row that chooses nothing says nothing
        return whole(name, values, least, most, missing=-1 if ordered else None, rows=number)
    try:
        weights = values.cast(pa.float64()).fill_null(np.nan).to_numpy()
    except (NotImplementedError, ValueError):  # Arrow's, for another type or a text
        raise ValueError(f"its column {name} holds no numbers") from None
    good = np.isnan(weights) | (weights >= 0) & (weights <= np.finfo(np.float16).max)
    if not good.all():
        at = int(np.argmin(good))
        raise ValueError(f"row {number[at]} has the weight {weights[at]}, which is none")
    return weights.astype(np.float16)
