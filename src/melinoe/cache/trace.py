"""
Traces: which experts a model chose, token by token.

A trace is evidence, so it carries where it came from, and one that is inconsistent is refused.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from melinoe.cache.requests import ForwardPass, forward_passes
from melinoe.cache.trace_checks import COMPLETION_ROW, PADDING_ROW, PROMPT_ROW, check_arrays
from melinoe.cache.trace_file import ARRAYS, read_trace_file, write_trace_file
from melinoe.errors import TraceError

__all__ = ["COMPLETION_ROW", "PADDING_ROW", "PROMPT_ROW", "Trace"]


@dataclass(frozen=True, eq=False)
class Trace:
    """
    What a model chose: one row per token that a forward pass computed, in the order they ran.

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
        scores: float16, as *experts*: the weight that the router gave each choice (what its output
            was multiplied by), 0 where there was none; None if that was not recorded.
        guesses: int16, as *experts*: what this layer's router said one layer early, of what the
            router before it saw, the most wanted first; -1 where nobody asked, as in the first
            layer and in prompts. None if that was not recorded.

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
        check_arrays(self)

    # --- what it is -----------------------------------------------------------------------------

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

    # --- parts of it ----------------------------------------------------------------------------

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
        return self._with(
            experts=self.experts[rows],
            forward=np.unique(self.forward[rows], return_inverse=True)[1].astype(np.int32),
            sequence=np.searchsorted(wanted, self.sequence[rows]).astype(np.int32),
            kind=self.kind[rows],
            scores=None if self.scores is None else self.scores[rows],
            guesses=None if self.guesses is None else self.guesses[rows],
        )

    def _with(self, **arrays: np.ndarray | None) -> "Trace":
        return Trace(
            **arrays,  # type: ignore[arg-type]
            num_experts=self.num_experts,
            model=self.model,
            fingerprint=self.fingerprint,
            versions=dict(self.versions),
            note=self.note,
        )

    @staticmethod
    def concat(traces: Sequence["Trace"]) -> "Trace":
        """
        One trace after the other; sequences and forward passes number on. The first one's header.

        Raises:
            TraceError: they are not all of the same model, or only some hold scores or guesses.
            ValueError: there are none.
        """
        if not traces:
            raise ValueError("there are no traces to put together")
        first = traces[0]
        scores = [trace.scores for trace in traces if trace.scores is not None]
        guesses = [trace.guesses for trace in traces if trace.guesses is not None]
        for name, found in (("scores", scores), ("guesses", guesses)):
            if 0 < len(found) < len(traces):
                raise TraceError(
                    f"some of the traces hold {name} and some do not; record them alike"
                )
        forward, sequence = [], []
        next_forward = next_sequence = 0
        for trace in traces:
            trace.check_model(first.fingerprint, first.num_layers, first.num_experts, first.top_k)
            forward.append(trace.forward + np.int32(next_forward))
            sequence.append(trace.sequence + np.int32(next_sequence))
            next_forward = int(forward[-1][-1]) + 1 if len(trace) else next_forward
            next_sequence += trace.num_sequences
        return first._with(
            experts=np.concatenate([t.experts for t in traces]),
            forward=np.concatenate(forward),
            sequence=np.concatenate(sequence),
            kind=np.concatenate([t.kind for t in traces]),
            scores=np.concatenate(scores) if scores else None,
            guesses=np.concatenate(guesses) if guesses else None,
        )

    # --- the file -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """
        Write one safetensors file: the arrays, and the header as JSON in its metadata.

        The file appears whole or not at all; one already there is replaced.

        Raises:
            TraceError: the place cannot be written to.
        """
        arrays = {name: getattr(self, name) for name in ARRAYS}
        for name in ("scores", "guesses"):
            if (array := getattr(self, name)) is not None:
                arrays[name] = array
        write_trace_file(
            path,
            arrays,
            {
                "model": self.model,
                "fingerprint": self.fingerprint,
                "num_experts": self.num_experts,
                "top_k": self.top_k,
                "versions": dict(self.versions),
                "note": self.note,
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Trace":
        """
        Read a file that `save` wrote, and check all of it.

        Raises:
            TraceError: it is missing, torn, no trace, of another version, or inconsistent.
        """
        arrays, header = read_trace_file(path)
        top_k = header.pop("top_k")
        fields: dict[str, Any] = {**arrays, **header}
        try:
            trace = cls(**fields)
        except TraceError as error:
            raise TraceError(str(error).replace("the trace", f"the trace {path}", 1)) from error
        if top_k != trace.top_k:
            raise TraceError(
                f"the trace {path} is malformed: its header says top-{top_k}, its rows hold "
                f"{trace.top_k} choices; record it again"
            )
        return trace
