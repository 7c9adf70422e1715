"""
Traces: which experts a model chose, token by token.

A trace is kept in one safetensors file with a header in JSON. A file that is torn, of another
version or inconsistent is refused, never read as far as it goes.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from melinoe.errors import TraceError
from melinoe.whole_file import parse_json, write_whole

PROMPT_ROW, COMPLETION_ROW, PADDING_ROW = 0, 1, 2

ARRAYS = {"experts": np.int16, "forward": np.int32, "sequence": np.int32, "kind": np.uint8}
HEADER: dict[str, type] = {
    "model": str,
    "fingerprint": str,
    "num_experts": int,
    "top_k": int,
    "versions": dict,
    "note": str,
}
_FORMAT = "melinoe-trace"
# Files are written in version 1. Versions 2 and 3 hold more for each choice, which nothing reads.
_NEWEST, _UNREAD = 3, {"scores", "guesses"}
_WAY_OUT = "record one with `melinoe trace`"


class ForwardPass(NamedTuple):
    """
    One forward pass; its phase is 1, completion, if it has a completion token and no prompt token,
    else 0. *requests* are, per layer, the distinct experts, ascending, and how many (token, choice)
    pairs picked each, padding's too.
    """

    phase: int
    rows: slice  # of the trace
    sequences: list[int]  # ascending
    requests: list[tuple[list[int], list[int]]]


@dataclass(frozen=True, eq=False)
class Trace:
    """
    The choices of a model: one row per token that a forward pass computed, in the order they ran.

    *experts* int16 (rows, layers, top_k), -1 for "no expert"; *forward* int32 (rows,), number of
    the pass, never decreasing; *sequence* int32 (rows,), which prompt the row belongs to; *kind*
    uint8 (rows,), 0 prompt, 1 completion, 2 padding. *fingerprint*: which weights chose; *model*,
    *versions* and *note* are for people. TraceError if they do not fit each other.
    """

    experts: np.ndarray
    forward: np.ndarray
    sequence: np.ndarray
    kind: np.ndarray
    num_experts: int
    model: str = ""
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        """Choices per token and layer."""
        return self.experts.shape[2]

    @property
    def num_sequences(self) -> int:
        """One more than the highest sequence number."""
        return int(self.sequence.max()) + 1 if len(self) else 0

    @property
    def num_forwards(self) -> int:
        """Forward passes that computed at least one row."""
        return len(self.bounds()[1])

    def check_model(
        self, fingerprint: str, num_layers: int, num_experts: int, top_k: int | None = None
    ) -> None:
        """Make sure that the trace was taken from this model; TraceError if it was not."""
        mine = (self.num_layers, self.num_experts, self.top_k)
        theirs = (num_layers, num_experts, self.top_k if top_k is None else top_k)
        if mine != theirs:
            raise TraceError(
                "the trace is of another model: it has {} layers of {} experts, top-{}, and the "
                "model {} layers of {}, top-{}; trace this model".format(*mine, *theirs)
            )
        if self.fingerprint != fingerprint:
            raise TraceError(
                f"the trace is of another model: it was taken from {self.model or 'a model'} with "
                f"fingerprint {self.fingerprint or '(none)'}, and this one has {fingerprint}; "
                "trace this model"
            )

    # --- requests -------------------------------------------------------------------------------

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Find where each forward pass's rows begin, int64 (passes + 1,), and its phase, uint8."""
        if not len(self):
            return np.zeros(1, np.int64), np.zeros(0, np.uint8)
        starts = np.flatnonzero(np.diff(self.forward, prepend=self.forward[0] - 1))
        prompts = np.logical_or.reduceat(self.kind == PROMPT_ROW, starts)
        completions = np.logical_or.reduceat(self.kind == COMPLETION_ROW, starts)
        return np.append(starts, len(self)), (completions & ~prompts).astype(np.uint8)

    def passes(self) -> Iterator[ForwardPass]:
        """All forward passes in order, each with the request it makes of every layer."""
        bounds, phases = self.bounds()
        begins = bounds.tolist()
        for begin, end, phase in zip(begins[:-1], begins[1:], phases.tolist(), strict=True):
            requests = []
            for choices in self.experts[begin:end].transpose(1, 0, 2).reshape(self.num_layers, -1):
                count = Counter(choices.tolist())
                del count[-1]
                experts = sorted(count)
                requests.append((experts, [count[expert] for expert in experts]))
            sequences = sorted(set(self.sequence[begin:end].tolist()))
            yield ForwardPass(phase, slice(begin, end), sequences, requests)

    def units(self) -> list[tuple[int, ...]]:
        """Group sequences that share forward passes, and so loads, as they begin."""
        rows = np.stack([self.forward, self.sequence], axis=1)
        changes = np.flatnonzero(np.any(np.diff(rows, axis=0, prepend=rows[:1] - 1), axis=1))
        group: dict[int, list[int]] = {}  # of each sequence, in the order of first rows
        leader, of_forward = -1, -1
        for forward, sequence in rows[changes].tolist():
            mine = group.setdefault(sequence, [sequence])
            if forward != of_forward:
                leader, of_forward = sequence, forward
            elif mine is not group[leader]:
                group[leader].extend(mine)
                group |= dict.fromkeys(mine, group[leader])
        return [tuple(sorted(unit)) for unit in {id(one): one for one in group.values()}.values()]

    def unit_of_passes(self) -> tuple[list[tuple[int, ...]], np.ndarray, np.ndarray]:
        """The units; of each pass its unit, int64 (passes,); whether it is that unit's first."""
        units = self.units()
        unit_of_sequence = np.zeros(self.num_sequences, np.int64)
        for number, unit in enumerate(units):
            unit_of_sequence[list(unit)] = number
        owner = unit_of_sequence[self.sequence[self.bounds()[0][:-1]]]
        begins = np.zeros(len(owner), bool)
        begins[np.unique(owner, return_index=True)[1]] = True
        return units, owner, begins

    # --- parts of it ----------------------------------------------------------------------------

    def prompt(self, sequence: int) -> np.ndarray:
        """Choices of a sequence's prompt tokens, int16 (tokens, layers, top_k)."""
        return self.experts[(self.sequence == sequence) & (self.kind == PROMPT_ROW)]

    def completion(self, sequence: int) -> np.ndarray:
        """Choices of a sequence's completion tokens, int16 (tokens, layers, top_k)."""
        return self.experts[(self.sequence == sequence) & (self.kind == COMPLETION_ROW)]

    def select(self, sequences: Iterable[int]) -> "Trace":
        """Keep only some sequences, numbered anew; ValueError for one without rows."""
        wanted = np.unique(np.fromiter(sequences, dtype=np.int32))
        absent = np.setdiff1d(wanted, self.sequence)
        if absent.size:
            raise ValueError(f"the trace has no rows of sequences {absent.tolist()}")
        rows = np.isin(self.sequence, wanted)
        return replace(
            self,
            experts=self.experts[rows],
            forward=np.unique(self.forward[rows], return_inverse=True)[1].astype(np.int32),
            sequence=np.searchsorted(wanted, self.sequence[rows]).astype(np.int32),
            kind=self.kind[rows],
        )

    # --- the file -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all; one already there is replaced."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        header = {name: getattr(self, name) for name in HEADER}
        header |= {"version": 1, "versions": dict(self.versions)}
        metadata = {"format": _FORMAT, "header": json.dumps(header)}
        write_file(path, save(arrays, metadata=metadata), "trace")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Trace":
        """Read a file that `save` wrote, and check all of it; TraceError for what is wrong."""
        arrays, header = _read(path)

        def refuse(fault: str) -> NoReturn:
            raise TraceError(f"the trace {path} is malformed: {fault}; record it again")

        version = header.pop("version", None)
        if version not in range(1, _NEWEST + 1):
            raise TraceError(
                f"the trace {path} is of format version {version!r}, and this melinoe reads "
                f"{_NEWEST} at most; {_WAY_OUT}, or install the melinoe that wrote it"
            )
        if {name: type(value) for name, value in header.items()} != HEADER:
            refuse(f"its header does not hold {', '.join(HEADER)}")
        arrays = {n: array for n, array in arrays.items() if version == 1 or n not in _UNREAD}
        if arrays.keys() != ARRAYS.keys():
            refuse(f"it holds {', '.join(sorted(arrays))} instead of {', '.join(sorted(ARRAYS))}")
        top_k = header.pop("top_k")
        try:
            trace = cls(**arrays, **header)
        except TraceError as error:
            raise TraceError(str(error).replace("the trace", f"the trace {path}", 1)) from error
        if top_k != trace.top_k:
            refuse(f"its header says top-{top_k}, its rows hold {trace.top_k} choices")
        return trace


def _read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a trace's arrays and its header; their contents are unchecked."""
    try:
        blob = Path(path).read_bytes()
    except OSError as error:
        raise TraceError(
            f"the trace {path} cannot be read: {error.strerror}; check the path"
        ) from error
    try:
        arrays = load(blob)
        (length,) = struct.unpack_from("<Q", blob)
        # The library's reader of bytes leaves the metadata out.
        metadata = parse_json(blob[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError, struct.error) as error:
        raise TraceError(
            f"the trace {path} is torn, or no trace ({error}); copy it again, or {_WAY_OUT}"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise TraceError(f"{path} is a safetensors file but holds no trace; {_WAY_OUT}")
    try:
        return arrays, dict(parse_json(metadata["header"]))
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(
            f"the trace {path} is malformed: the header is not readable; {_WAY_OUT}"
        ) from error


def write_file(path: str | os.PathLike, blob: bytes, noun: str) -> None:
    """Write a file that appears whole or not at all; TraceError if the place cannot be written."""
    try:
        write_whole(path, blob)
    except OSError as error:
        raise TraceError(
            f"the {noun} cannot be written to {path}: {error.strerror}; choose another place"
        ) from error


def _check(trace: Trace) -> None:
    """Refuse a trace whose arrays do not fit each other or the header."""

    def refuse(fault: str) -> NoReturn:
        raise TraceError(f"the trace is malformed: {fault}; record it again")

    for name, dtype in ARRAYS.items():
        array = getattr(trace, name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            refuse(f"{name} is not an array of {np.dtype(dtype).name}")
        if array.ndim != (3 if name == "experts" else 1):
            refuse(f"{name} has {array.ndim} dimensions")
        if len(array) != len(trace.experts):
            refuse(f"{name} has {len(array)} rows where experts has {len(trace.experts)}")
    if trace.num_layers < 1 or trace.top_k < 1:
        refuse(f"it has {trace.num_layers} layers and top-{trace.top_k} choices")
    if not 1 <= trace.num_experts <= np.iinfo(np.int16).max:
        refuse(f"it names {trace.num_experts} experts")
    if not len(trace.experts):
        return
    low, high = trace.experts.min(), trace.experts.max()
    if low < -1 or high >= trace.num_experts:
        refuse(f"expert ids run from {low} to {high} in a model of {trace.num_experts} experts")
    if trace.forward[0] < 0 or (np.diff(trace.forward) < 0).any():
        refuse("the numbers of forward passes decrease")
    if trace.sequence.min() < 0:
        refuse("a sequence number is negative")
    if trace.kind.max() > PADDING_ROW:
        refuse(f"row kind {trace.kind.max()} is unknown")


def known_ids(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Turn any integers into ids of a trace: int16, -1 where outside ``[0, num_experts)``."""
    return np.where((ids >= 0) & (ids < num_experts), ids, -1).astype(np.int16)
