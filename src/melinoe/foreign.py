"""
Read a table of choices as a trace: CSV, Parquet, JSON lines or numpy arrays of other tools.

A row is a token in one layer with all its choices, or a single choice (docs/traces.md).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.errors import TraceError

SUFFIXES = (".csv", ".parquet", ".jsonl", ".ndjson", ".npz", ".npy")
MOST = np.iinfo(np.int32).max
# The name of a column here, and its other spellings.
_SPELLINGS = {
    "token": "token_idx token_index token_pos position pos",
    "layer": "layer_id layer_idx layer_index layer_num moe_layer",
    "expert": "expert_id expert_idx expert_index",
    "experts": "expert_ids topk_ids topk_idx topk_indices top_k_index selected_experts",
    "rank": "k slot choice",
    "sequence": "sequence_id seq seq_id req_id request request_id prompt_id sample_id",
    "kind": "phase",
    "forward": "forward_id forward_pass step step_id iteration",
}
_NAMES = {other: name for name, others in _SPELLINGS.items() for other in others.split()}
_OF_ONE = re.compile(r"expert_\d+")
_DIGITS = re.compile(r"-?[0-9]+")
_OF_LOG = ("model_id", "num_experts")  # in header lines
_KINDS = {"prompt": 0, "completion": 1, "padding": 2, "prefill": 0, "decode": 1}
_KINDS |= {"0": 0, "1": 1, "2": 2}
# Tokens that choose alike in every layer from the first one on are a warm-up from so many on.
_WARM_UP = 16
Rows = dict[str, np.ndarray]


class Imported(NamedTuple):
    """A trace, and what was assumed or left out on the way to it, for people."""

    trace: Trace
    notes: list[str]


def read_foreign(
    path: str | os.PathLike, num_experts: int | None = None, model: str = ""
) -> Imported:
    """
    Read a trace from a table.

    Args:
        path: Its name's ending tells the form: one of `SUFFIXES`, texts also with ``.gz``.
        num_experts: Experts of each layer, if no header line of the table says it.
        model: Its name, for people.

    Raises:
        TraceError: it cannot be read, or says no order of tokens; with a way that works.
    """
    columns, notes = _read_columns(path), list[str]()
    try:
        columns, told = _known(columns, notes)
        experts = num_experts or told.get("num_experts")
        if not isinstance(experts, int):
            raise ValueError("it does not say how many experts a layer has; give --num-experts")
        if told.get("num_experts", experts) != experts:
            raise ValueError(f"it is of {told['num_experts']} experts; leave --num-experts out")
        model, note = model or str(told.get("model_id", "")), f"imported from {Path(path).name}"
        return Imported(_trace(_rows(columns, experts), experts, model, note, notes), notes)
    except (ValueError, NotImplementedError, TraceError) as error:  # Arrow's, of nested columns
        raise TraceError(
            f"the table {path} cannot be imported: {error}; docs/traces.md has the forms"
        ) from error


def _read_columns(path: str | os.PathLike) -> dict[str, Any]:
    """Read Arrow arrays by the name of the column, as the file has it; texts may be gzipped."""
    import pyarrow as pa
    from pyarrow import csv, json, parquet

    kind = Path(str(path).removesuffix(".gz")).suffix
    if not Path(path).is_file():
        raise TraceError(f"{path} is no file; check the path")
    if kind not in SUFFIXES:
        raise TraceError(f"{path} is not one of {', '.join(SUFFIXES)}; name a table so")
    try:
        if kind in (".npz", ".npy"):
            return _of_arrays(path)
        if kind == ".parquet":
            table = parquet.read_table(path)
        else:
            with pa.input_stream(str(path), compression="detect") as stream:
                blob = pa.BufferReader(pa.py_buffer(stream.read().removeprefix(b"\xef\xbb\xbf")))
            # A block must hold the longest line.
            table = (
                csv.read_csv(blob)
                if kind == ".csv"
                else json.read_json(blob, read_options=json.ReadOptions(block_size=1 << 26))
            )
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    # Arrow's own, and those that texts of another encoding raise.
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        said = (str(error) or "it is empty").splitlines()[0]
        raise TraceError(f"the table {path} cannot be read ({said}); check the file") from error
    return {
        name: values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        for name, values in columns.items()
    }


def _of_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """
    Read arrays as a table whose rows are the layers of each token, in that order.

    The array ``experts``, another name of it or the only one holds integers (tokens, layers, k);
    beside it may stand one number for each token. Arrays shaped as the experts are left out.
    """
    import pyarrow as pa

    with Path(path).open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)  # objects are pickles
            arrays = {"experts": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        except Exception as error:  # a header is Python's text, and fails in as many ways
            raise ValueError(str(error)) from error
    called = [name for name in arrays if _NAMES.get(name, name) == "experts"] or list(arrays)
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
        if values.shape == (tokens,):
            columns[name] = np.repeat(values, layers)
        elif values.shape != experts.shape:
            raise ValueError(
                f"{name} has the shape {values.shape}, which fits no token; take it out"
            )
    return {name: pa.array(values) for name, values in columns.items()}


def _known(columns: dict[str, Any], notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rename columns to the names used here, and take out header lines and what they tell."""
    import pyarrow.compute as pc

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
    choices = [name for name in found if re.fullmatch(r"experts?|expert_\d+", name)]
    lacks = [name for name in ("layer", "token") if name not in found] + ["expert"] * (not choices)
    if lacks:
        raise ValueError(f"it has no column {lacks[0]}, but {', '.join(columns) or 'none at all'}")
    if odd := [given for given, name in ours.items() if name not in found]:
        notes.append(f"columns left out: {', '.join(odd)}")
    header = pc.and_(found["layer"].is_null(), found[choices[0]].is_null())
    told: dict[str, Any] = {}
    for name in set(_OF_LOG) & found.keys():
        values = found.pop(name).filter(header).drop_null()
        told |= {name: values[0].as_py()} if len(values) else {}
    kept = np.flatnonzero(~header.to_numpy(zero_copy_only=False))
    rows = {name: values.take(kept) for name, values in found.items()}
    # A column of header lines alone is none of the rows'.
    rows = {
        name: values
        for name, values in rows.items()
        if values.null_count < len(values) or name in ("layer", *choices) or _OF_ONE.fullmatch(name)
    }
    return rows | {"number": kept + 1}, told


# --- exact numbers --------------------------------------------------------------------------------


def _whole(
    name: str,
    values: Any,
    low: int,
    high: int = MOST,
    *,
    rows: np.ndarray,
    missing: int | None = None,
) -> np.ndarray:
    """
    Read exact whole numbers, int64, from an Arrow array: integers, whole floats or texts of digits.

    *missing* stands for an empty value; without it an empty one is refused. A ValueError names the
    column, the value and its row; *rows* number those, from 1.
    """
    import pyarrow as pa

    empty = values.is_null().to_numpy(zero_copy_only=False).copy()
    if pa.types.is_null(values.type):
        values = values.cast(pa.int64())
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        given = values.fill_null(0).to_numpy(zero_copy_only=False)
        # Bounds may lie beyond a small float's.
        numbers = given.astype(np.float64) if given.dtype.kind == "f" else given
    else:
        given = values.to_pylist()
        digits = (isinstance(one, str) and _DIGITS.fullmatch(one.strip()) for one in given)
        read = (float(one) if good else np.nan for one, good in zip(given, digits, strict=True))
        numbers = np.fromiter(read, np.float64)
        empty |= np.array([one == "" for one in given], bool)
    good = (numbers >= low) & (numbers <= high)
    if numbers.dtype.kind == "f":  # which holds not every whole number beyond 2^53
        good &= (numbers == np.floor(numbers)) & (np.abs(numbers) <= 2**53)
    good = np.where(empty, missing is not None, good)
    if not good.all():
        at = int(np.argmin(good))
        said = "no" if empty[at] else f"the value {values[at].as_py()!r} as its"
        raise ValueError(
            f"row {rows[at]} has {said} {name}, which is a whole number from {low} to {high}"
        )
    found = np.where(empty, 0, numbers).astype(np.int64)
    found[empty] = missing or 0
    return found


def _rows(columns: dict[str, Any], num_experts: int) -> Rows:
    """Take exact numbers of each column, with all choices of a token and layer in one row."""
    number = columns["number"]
    if not len(number):
        raise ValueError("it has no rows")
    rows: Rows = {"number": number}
    for name in ("token", "layer", "forward", "rank"):
        if name in columns:
            rows[name] = _whole(name, columns[name], 0, rows=number)
    if "sequence" in columns:
        rows["sequence"] = _sequences(columns["sequence"], number)
    if "kind" in columns:
        rows["kind"] = _kinds(columns["kind"], number)
    rows["experts"] = _chosen(columns, number, num_experts - 1)
    return _gathered(rows) if "expert" in columns else rows


def _sequences(names: Any, number: np.ndarray) -> np.ndarray:
    """Number sequences, which are numbers or texts, from 0 as they first appear."""
    import pyarrow as pa

    if not pa.types.is_string(names.type):
        names = pa.array(_whole("sequence", names, 0, np.iinfo(np.int64).max, rows=number))
    codes = names.dictionary_encode().indices
    if codes.null_count:
        raise ValueError(f"row {number[np.argmax(codes.is_null())]} has no sequence")
    return codes.to_numpy().astype(np.int64)


def _kinds(words: Any, number: np.ndarray) -> np.ndarray:
    """Turn kinds of rows, which are words or numbers, into uint8."""
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


def _chosen(columns: dict[str, Any], number: np.ndarray, most: int) -> np.ndarray:
    """Experts, int64 (rows, k), -1 for none."""
    import pyarrow.compute as pc

    if "experts" in columns:
        lists = columns["experts"]
        if "list" not in str(lists.type):
            raise ValueError("its column of experts holds no lists")
        lengths = pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)
        row = np.repeat(np.arange(len(number)), lengths)
        place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        flat = pc.list_flatten(lists)
        matrix = np.full((len(number), max(1, lengths.max())), -1, np.int64)
        matrix[row, place] = _whole("expert", flat, -1, most, missing=-1, rows=number[row])
        return matrix
    names = [name for name in columns if _OF_ONE.fullmatch(name)]
    wanted = ["expert"] if "expert" in columns else [f"expert_{k}" for k in range(len(names))]
    if odd := set(names).symmetric_difference(wanted) - {"expert"}:
        raise ValueError(f"its columns do not match at {', '.join(sorted(odd))}")
    each = [_whole(name, columns[name], -1, most, missing=-1, rows=number) for name in wanted]
    return np.stack(each, axis=-1)


def _changes(keys: list[np.ndarray]) -> np.ndarray:
    """Mark entries in which an array differs from the one before; the first is marked."""
    changed = np.ones(len(keys[0]), bool)
    changed[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return changed


def _gathered(rows: Rows) -> Rows:
    """Put choices that stand in rows of their own, of one token and layer, into one row."""
    keys = [rows[name] for name in ("layer", "token", "sequence", "forward") if name in rows]
    if "rank" in rows:
        order = np.lexsort([rows["rank"], *keys])
        if _changes([key[order] for key in (rows["rank"], *keys)]).all():  # no numbering restarts
            rows = {name: values[order] for name, values in rows.items()}
            keys = [key[order] for key in keys]
    first = _changes(keys)
    if "rank" in rows:
        first[1:] |= np.diff(rows["rank"]) <= 0
    starts = np.flatnonzero(first)
    row = np.cumsum(first) - 1
    place = np.arange(len(first)) - starts[row]
    found = {name: values[starts] for name, values in rows.items()}
    found["experts"] = np.full((len(starts), place.max() + 1), -1, rows["experts"].dtype)
    found["experts"][row, place] = rows["experts"][:, 0]
    return found


# --- tokens in order ------------------------------------------------------------------------------


def _trace(rows: Rows, num_experts: int, model: str, note: str, notes: list[str]) -> Trace:
    """Make a trace; ValueError if the rows do not say an order, with a row and a way that works."""
    layers, at = np.unique(rows["layer"], return_inverse=True)
    if layers[-1] != len(layers) - 1:
        notes.append(f"layers {', '.join(map(str, layers))} are numbered from 0, without gaps")
    rows = _in_order(rows | {"layer": at}, len(layers))
    first = {name: values[:: len(layers)] for name, values in rows.items()}
    for name in ("sequence", "kind", "forward"):
        if name in rows:
            differ = rows[name] != np.repeat(first[name], len(layers))
            if differ.any():
                number = rows["number"][np.argmax(differ)]
                raise ValueError(f"row {number} has another {name} than its token's first layer")
    chosen = np.sort(rows["experts"], axis=1)
    twice = ((chosen[:, 1:] == chosen[:, :-1]) & (chosen[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise ValueError(
            f"the token at row {rows['number'][np.argmax(twice)]} chooses an expert twice in one "
            f"layer, so it is several tokens of one number; number them on"
        )
    shape = (-1, len(layers), rows["experts"].shape[1])
    experts = rows["experts"].reshape(shape)
    if "kind" not in first:
        other = (experts != experts[:1]).any(axis=(1, 2))
        alike = int(np.argmax(other)) if other.any() else len(experts)
        if "forward" in first:  # whole passes
            ends = np.append(np.flatnonzero(_changes([first["forward"]])), len(experts))
            alike = int(ends[ends <= alike].max())
        if alike >= _WARM_UP:
            notes.append(
                f"the first {alike} tokens choose alike in every layer, as a warm-up does: left out"
            )
            first = {name: values[alike:] for name, values in first.items()}
            experts = experts[alike:]
            if not len(experts):
                raise ValueError("nothing else is in it; record while requests are served")
    sequence, kind, forward = _owners(first, notes)
    return Trace(
        experts.astype(np.int16),
        np.unique(forward, return_inverse=True)[1].astype(np.int32),
        np.unique(sequence, return_inverse=True)[1].astype(np.int32),
        kind.astype(np.uint8),
        num_experts,
        model,
        note="; ".join([note, *notes]),
    )


def _in_order(rows: Rows, layers: int) -> Rows:
    """
    Sort rows by token and layer, so that every token has each layer once.

    Tokens are told apart by the first of these that does: their number; sequence and number;
    forward pass and number; and passes that begin wherever the numbers do not go on.
    """
    token, layer = rows["token"], rows["layer"]
    ways: list[list[np.ndarray]] = [[token]]
    ways += [[rows[name], token] for name in ("sequence", "forward") if name in rows]
    if "forward" not in rows:
        mine = np.flatnonzero(layer == layer[0])
        begins = np.zeros(len(token), np.int64)
        begins[mine[1:]] = np.diff(token[mine]) <= 0
        ways.append([np.cumsum(begins), token])
    for keys in ways:
        order = np.lexsort([layer, *reversed(keys)])
        if _changes([key[order] for key in (*keys, layer)]).all():
            break
    else:
        raise ValueError(
            "tokens of one number are in the same layer twice; number them on, or add a column "
            "sequence or forward"
        )
    if "forward" not in rows and len(keys) > 1 and keys is ways[-1]:
        rows = rows | {"forward": keys[0]}
        if "sequence" in rows and not rows["sequence"].any():
            del rows["sequence"]  # one name for whatever was served tells nothing apart
    rows = {name: values[order] for name, values in rows.items()}
    tokens = np.cumsum(_changes([key[order] for key in keys])) - 1
    expected = np.arange(len(tokens))
    wrong = (tokens != expected // layers) | (rows["layer"] != expected % layers)
    if wrong.any() or len(tokens) % layers:
        number = rows["number"][np.argmax(wrong) if wrong.any() else -1]
        raise ValueError(
            f"a token at row {number} has not every layer; write a row for each of the {layers} "
            "layers"
        )
    return rows


def _owners(rows: Rows, notes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find sequence, kind and forward pass of each token; if not told, as one user's would be."""
    sequence, kind, forward = (rows.get(name) for name in ("sequence", "kind", "forward"))
    tokens = len(rows["token"])
    if forward is None:
        if sequence is None:
            sequence = np.zeros(tokens, np.int64)
            notes.append("nothing says which tokens belong together: taken as one sequence")
        if kind is None:
            kind = np.full(tokens, COMPLETION_ROW)
            notes.append("nothing says which tokens are a prompt's: all taken as completions")
        # A prompt is one pass, and each token of a completion one of its own.
        new = _changes([sequence]) | (kind == COMPLETION_ROW)
        new[1:] |= kind[:-1] == COMPLETION_ROW
        return sequence, kind, np.cumsum(new)
    if (np.diff(forward) < 0).any():
        number = rows["number"][1 + np.argmax(np.diff(forward) < 0)]
        raise ValueError(f"row {number} is of an earlier forward pass than the token before it")
    if sequence is None:
        begins = _changes([forward])
        number = np.cumsum(begins) - 1
        several = np.bincount(number) > 1
        if kind is None and (several[1:] & several[:-1]).any():
            mixed = np.flatnonzero(begins)[1 + np.argmax(several[1:] & several[:-1])]
            raise ValueError(
                f"the passes up to row {rows['number'][mixed]} mix several requests, and nothing "
                "says whose tokens are whose; record one request at a time (in vLLM "
                "max_num_seqs=1), or log a request's id as req_id"
            )
        starts = several if kind is None else kind[begins] == PROMPT_ROW
        starts[1:] &= ~starts[:-1]
        sequence = np.cumsum(starts)[number]
        notes.append("a pass of several tokens is taken as the prompt that begins a sequence")
    if kind is None:
        # A request's first pass is its prompt, and so is each that reads several of its tokens.
        pairs, at, size = np.unique(
            np.stack([sequence, forward]), axis=1, return_inverse=True, return_counts=True
        )
        prompt = (size > 1) | _changes([pairs[0]])
        kind = np.where(prompt[at.ravel()], PROMPT_ROW, COMPLETION_ROW)
    return sequence, kind, forward
