"""
Traces: which experts a model chose, token by token.

A trace is evidence, so it carries where it came from, and one that is inconsistent is refused. It
is kept in one safetensors file with a header in JSON; a file that is torn, of another version or of
other contents is refused, never read as far as it goes.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from melinoe.cache.requests import ForwardPass, forward_passes
from melinoe.cache.tensor_file import FileKind
from melinoe.errors import TraceError

PROMPT_ROW, COMPLETION_ROW, PADDING_ROW = 0, 1, 2

ARRAYS = {"experts": np.int16, "forward": np.int32, "sequence": np.int32, "kind": np.uint8}
OPTIONAL = {"scores": np.float16, "guesses": np.int16}  # shaped as the experts
HEADER: dict[str, type] = {
    "model": str,
    "fingerprint": str,
    "num_experts": int,
    "top_k": int,
    "versions": dict,
    "note": str,
}
# A file has the lowest version that allows its arrays, for older readers: 2 with scores, 3 with
# guesses, else 1.
_KIND = FileKind(
    "melinoe-trace",
    (1, 2, 3),
    "the trace {} is",
    "trace",
    "record one with `melinoe trace`",
    TraceError,
)


@dataclass(frozen=True, eq=False)
class Trace:
    """
    The choices of a model: one row per token that a forward pass computed, in the order they ran.

    Attributes:
        experts: int16 (rows, layers, top_k), ids the model chose; -1 means "no expert".
        forward: int32 (rows,), number of the forward pass, from 0, never decreasing.
        sequence: int32 (rows,), which prompt the row belongs to, from 0.
        kind: uint8 (rows,), 0 prompt, 1 completion, 2 padding.
        num_experts: Experts of each layer.
        model: Name or path of the model; for people.
        fingerprint: Which weights chose; see `check_model`.
        versions: Libraries that made it, name to version.
        note: Anything worth knowing.
        scores: float16, as *experts*: the weight that the router gave each choice (by which its
            output was multiplied), 0 where there was none; None if that was not recorded.
        guesses: int16, as *experts*: the choices of this layer's router one layer early, for the
            input of the router before it, the most wanted first; -1 where nobody asked, as in the
            first layer and in prompts. None if that was not recorded.

    Raises:
        TraceError: the arrays do not fit each other or the header.
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
    scores: np.ndarray | None = None
    guesses: np.ndarray | None = None

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
        return int((np.diff(self.forward) > 0).sum()) + 1 if len(self) else 0

    def check_model(
        self, fingerprint: str, num_layers: int, num_experts: int, top_k: int | None = None
    ) -> None:
        """
        Make sure that the trace was taken from this model.

        Raises:
            TraceError: it was not.
        """
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

    def passes(self) -> Iterator[ForwardPass]:
        """All forward passes in order, each with the request it makes of every layer."""
        return forward_passes(
            self.experts,
            self.forward,
            self.sequence,
            self.kind == PROMPT_ROW,
            self.kind == COMPLETION_ROW,
            self.num_experts,
            self.scores,
            self.guesses,
        )

    def layer_requests(self) -> list[list[list[int]]]:
        """Distinct ids of each request, by layer and then by forward pass."""
        layers: list[list[list[int]]] = [[] for _ in range(self.num_layers)]
        for forward in self.passes():
            for layer, (experts, _) in zip(layers, forward.requests, strict=True):
                layer.append(experts)
        return layers

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Find where each forward pass's rows begin, int64 (passes + 1,), and its phase, uint8."""
        if not len(self):
            return np.zeros(1, np.int64), np.zeros(0, np.uint8)
        starts = np.flatnonzero(np.diff(self.forward, prepend=self.forward[0] - 1))
        prompts = np.logical_or.reduceat(self.kind == PROMPT_ROW, starts)
        completions = np.logical_or.reduceat(self.kind == COMPLETION_ROW, starts)
        return np.append(starts, len(self)), (completions & ~prompts).astype(np.uint8)

    def units(self) -> list[tuple[int, ...]]:
        """
        Group sequences that share forward passes, in the order in which the groups begin.

        Costs can be told apart for such units, not for sequences: a load made for a batch belongs
        to all of it.
        """
        rows = np.stack([self.forward, self.sequence], axis=1)
        changes = np.flatnonzero(np.any(np.diff(rows, axis=0, prepend=rows[:1] - 1), axis=1))
        pairs = rows[changes]
        # Rows of a pass that belong to one sequence are one change; so without a shared pass there
        # are as many changes as passes.
        if len(pairs) == len(np.unique(pairs[:, 0])):
            return [(sequence,) for sequence in dict.fromkeys(pairs[:, 1].tolist())]
        group: dict[int, int] = {}

        def find(sequence: int) -> int:
            while group[sequence] != sequence:
                group[sequence] = sequence = group[group[sequence]]
            return sequence

        leader, of_forward = -1, -1
        for forward, sequence in pairs.tolist():
            if forward != of_forward:
                leader, of_forward = sequence, forward
            group.setdefault(sequence, sequence)
            group[find(sequence)] = find(leader)
        units: dict[int, list[int]] = {}
        for sequence in group:  # insertion order is the order of first rows
            units.setdefault(find(sequence), []).append(sequence)
        return [tuple(sorted(unit)) for unit in units.values()]

    def unit_of_passes(
        self, bounds: np.ndarray
    ) -> tuple[list[tuple[int, ...]], np.ndarray, np.ndarray]:
        """
        Assign each forward pass to its unit.

        Args:
            bounds: From `bounds`.

        Returns:
            The units; of each pass its unit, int64 (passes,); and whether it is that unit's first,
            bool (passes,).
        """
        units = self.units()
        unit_of_sequence = np.zeros(self.num_sequences, np.int64)
        for number, unit in enumerate(units):
            unit_of_sequence[list(unit)] = number
        owner = unit_of_sequence[self.sequence[bounds[:-1]]]
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
        """
        Keep only some sequences, in the order in which they ran.

        Sequences and forward passes are numbered anew from 0, without gaps. Where a pass ran
        several sequences together, only the rows of those kept remain in it.

        Raises:
            ValueError: the trace has no rows of one of them.
        """
        wanted = np.unique(np.fromiter(sequences, dtype=np.int32))
        absent = np.setdiff1d(wanted, self.sequence)
        if absent.size:
            raise ValueError(f"the trace has no rows of sequences {absent.tolist()}")
        rows = np.isin(self.sequence, wanted)
        kept = {name: array[rows] for name, array in self._arrays().items()}
        kept["forward"] = np.unique(kept["forward"], return_inverse=True)[1].astype(np.int32)
        kept["sequence"] = np.searchsorted(wanted, kept["sequence"]).astype(np.int32)
        return self._with(kept)

    def _arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, those that were recorded."""
        found = {name: getattr(self, name) for name in (*ARRAYS, *OPTIONAL)}
        return {name: array for name, array in found.items() if array is not None}

    def _with(self, arrays: Mapping[str, np.ndarray]) -> "Trace":
        """Make a trace of other arrays with this one's header."""
        header = {name: getattr(self, name) for name in HEADER if name != "top_k"}
        fields: dict[str, Any] = {**arrays, **header}
        return Trace(**fields)

    # --- the file -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """
        Write one safetensors file: the arrays, and the header as JSON in its metadata.

        The file appears whole or not at all; one already there is replaced.

        Raises:
            TraceError: the place cannot be written to.
        """
        version = 3 if self.guesses is not None else 2 if self.scores is not None else 1
        header = {name: getattr(self, name) for name in HEADER}
        header["versions"] = dict(self.versions)
        _KIND.write(path, self._arrays(), {"version": version, **header})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Trace":
        """
        Read a file that `save` wrote, and check all of it.

        Raises:
            TraceError: it is missing, torn, no trace, of another version, or inconsistent.
        """
        arrays, header, version = _KIND.read(path)

        def refuse(fault: str) -> NoReturn:
            raise TraceError(f"the trace {path} is malformed: {fault}; record it again")

        if {name: type(value) for name, value in header.items()} != HEADER:
            refuse(f"its header does not hold {', '.join(HEADER)}")
        wanted = {*ARRAYS, *({"scores"} if version == 2 else {"guesses"} if version == 3 else ())}
        if arrays.keys() != wanted | ({"scores"} & arrays.keys() if version == 3 else set()):
            refuse(f"it holds {', '.join(sorted(arrays))} instead of {', '.join(sorted(wanted))}")
        top_k = header.pop("top_k")
        fields: dict[str, Any] = {**arrays, **header}
        try:
            trace = cls(**fields)
        except TraceError as error:
            raise TraceError(str(error).replace("the trace", f"the trace {path}", 1)) from error
        if top_k != trace.top_k:
            refuse(f"its header says top-{top_k}, its rows hold {trace.top_k} choices")
        return trace


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
    scores, guesses = trace.scores, trace.guesses
    for name, array in (("scores", scores), ("guesses", guesses)):
        if array is not None and (
            getattr(array, "dtype", None) != OPTIONAL[name] or array.shape != trace.experts.shape
        ):
            refuse(f"its {name} are not one {np.dtype(OPTIONAL[name]).name} for each choice")
    if scores is not None and not (np.isfinite(scores) & (scores >= 0)).all():
        refuse("a score is negative or no number")
    if trace.num_layers < 1 or trace.top_k < 1:
        refuse(f"it has {trace.num_layers} layers and top-{trace.top_k} choices")
    if not 1 <= trace.num_experts <= np.iinfo(np.int16).max:
        refuse(f"it names {trace.num_experts} experts")
    if not len(trace.experts):
        return
    for ids, said in ((trace.experts, "expert ids run"), (guesses, "it guesses ids")):
        if ids is not None and (ids.min() < -1 or ids.max() >= trace.num_experts):
            refuse(
                f"{said} from {ids.min()} to {ids.max()} in a model of {trace.num_experts} experts"
            )
    if trace.forward[0] < 0 or (np.diff(trace.forward) < 0).any():
        refuse("the numbers of forward passes decrease")
    if trace.sequence.min() < 0:
        refuse("a sequence number is negative")
    if trace.kind.max() > PADDING_ROW:
        refuse(f"row kind {trace.kind.max()} is unknown")


# --- recording one --------------------------------------------------------------------------------


def known_ids(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """
    Turn ids into those of a trace: int16, -1 wherever no expert is meant.

    Args:
        ids: Any integers. A negative id means no expert, and so does one at or above
            *num_experts*: what some families write for a skipped choice.
        num_experts: Of the layer that the ids are of.
    """
    return np.where((ids >= 0) & (ids < num_experts), ids, -1).astype(np.int16)


class TraceBuilder:
    """
    Collect forward passes into a `Trace`.

    Args:
        num_layers: MoE layers.
        num_experts: Experts of each layer.
        top_k: Choices per token and layer.
    """

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        self._shape = (num_layers, top_k)
        self._num_experts = num_experts
        self._passes: list[dict[str, np.ndarray]] = []

    def __len__(self) -> int:
        return len(self._passes)

    def add_forward(
        self,
        experts: np.ndarray,
        sequence: np.ndarray | int,
        kind: np.ndarray | int,
        scores: np.ndarray | None = None,
        guesses: np.ndarray | None = None,
    ) -> None:
        """
        Append one forward pass.

        Args:
            experts: Any integers (rows, layers, top_k), see `known_ids`.
            sequence: Which prompt each row belongs to, (rows,) or one for all.
            kind: 0 prompt, 1 completion, 2 padding, (rows,) or one for all.
            scores: The router's weights, as *experts*; of all passes or of none.
            guesses: See `Trace`; of all passes or of none.

        Raises:
            ValueError: another shape, numbers that are not whole or beyond those of a trace, or
                scores or guesses of some passes only.
        """
        experts = np.asarray(experts)
        if experts.dtype.kind not in "iu":
            raise ValueError(f"experts must be whole numbers, not {experts.dtype}")
        if experts.ndim != 3 or experts.shape[1:] != self._shape:
            raise ValueError(
                f"experts has shape {experts.shape}, not (rows, {self._shape[0]}, {self._shape[1]})"
            )
        for name, given in (("scores", scores), ("guesses", guesses)):
            if self._passes and (name in self._passes[0]) != (given is not None):
                raise ValueError(f"{name} must be given for all forward passes, or for none")
        ids, rows = known_ids(experts, self._num_experts), (len(experts),)
        added = {
            "experts": ids,
            "sequence": _whole("sequence", sequence, rows, np.int32, np.iinfo(np.int32).max),
            "kind": _whole("kind", kind, rows, np.uint8, PADDING_ROW),
        }
        if scores is not None:
            weights = np.broadcast_to(np.asarray(scores), experts.shape)
            added["scores"] = np.where(ids >= 0, weights, 0).astype(np.float16)
        if guesses is not None:
            early = np.broadcast_to(np.asarray(guesses), experts.shape)
            added["guesses"] = known_ids(early, self._num_experts)
        self._passes.append(added)

    def trace(
        self,
        model: str = "",
        fingerprint: str = "",
        versions: Mapping[str, str] | None = None,
        note: str = "",
    ) -> Trace:
        """Make one trace of everything so far; more can be added afterwards."""
        empty: dict[str, np.ndarray] = {
            "experts": np.zeros((0, *self._shape), np.int16),
            "sequence": np.zeros(0, np.int32),
            "kind": np.zeros(0, np.uint8),
        }
        parts = self._passes or [empty]
        lengths = np.array([len(one["experts"]) for one in self._passes], np.int64)
        return Trace(
            **{name: np.concatenate([one[name] for one in parts]) for name in parts[0]},
            forward=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
            num_experts=self._num_experts,
            model=model,
            fingerprint=fingerprint,
            versions=versions or {},
            note=note,
        )


def _whole(
    name: str, values: np.ndarray | int, shape: tuple[int, ...], dtype: type[np.integer], most: int
) -> np.ndarray:
    """Check for numbers from 0 to *most*; a cast to *dtype* alone would wrap others round."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or (array.size and not 0 <= array.min() <= array.max() <= most):
        raise ValueError(f"{name} must be whole numbers from 0 to {most}")
    return np.broadcast_to(array.astype(dtype), shape).copy()
