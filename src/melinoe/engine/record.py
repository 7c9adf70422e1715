"""Record what a model's routers chose while it runs, offloaded or with every expert resident."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.counters import PROMPT
from melinoe.cache.trace import Trace, known_ids
from melinoe.config.names import version_of
from melinoe.engine.calls import Batch, rows_of
from melinoe.errors import TraceError


class Recorder:
    """
    Collects one row per token of each forward pass; see `Trace`.

    Each row of a batch that begins a prompt is a sequence of its own; beams count as such rows.

    Args:
        num_experts: of each MoE layer.
        model: its name, for people.
        fingerprint: of the weights that choose.
        scores: whether to keep the weight that each choice was given.
        guesses: whether to keep what the next layer's router said early.
        note: what a reader of the trace must know of how it came about.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        model: str,
        fingerprint: str,
        *,
        scores: bool = False,
        guesses: bool = False,
        note: str = "",
    ) -> None:
        self._note = note
        self._num_experts = tuple(num_experts)
        self._model = model
        self._fingerprint = fingerprint
        self._keeps_scores, self._keeps_guesses = scores, guesses
        self._chosen: dict[int, Tensor] = {}
        self._early: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] = {}
        self._passes: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._guesses: list[np.ndarray] = []
        self._sequences: list[np.ndarray] = []
        self._kinds: list[np.ndarray] = []
        self._now: tuple[np.ndarray, np.ndarray] | None = None
        self._base = 0  # sequence number of the first row of the batch that is running
        self._batch = 0  # rows of that batch

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """A pass of *tokens* rows begins, within *call* if the model was called as a whole."""
        batch = call.batch if call is not None else 1
        if phase == PROMPT and not (call is not None and call.continues and self._batch == batch):
            self._base += self._batch
            self._batch = batch
        rows, kinds = rows_of(call, phase, tokens)
        self._now = (rows + np.int32(self._base), kinds)
        self._chosen, self._weights, self._early = {}, {}, {}

    def add(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> None:
        """The rows of the open pass chose ``top_k_index`` ``(tokens, top_k)`` in *layer*."""
        if self._now is not None and self._keeps_scores:
            if top_k_weights is None:
                raise TraceError("this engine does not tell weights; record without scores")
            self._weights[layer] = top_k_weights.detach().to(torch.float16, copy=True)
        if self._now is not None:
            # A copy on the device; brought to the host at the end of the pass, not layer by layer.
            self._chosen[layer] = top_k_index.detach().to(torch.int32, copy=True)

    def add_guess(self, layer: int, guess: Tensor) -> None:
        """The router of *layer* was asked early, and said *guess* ``(tokens, top_k)``."""
        if self._now is not None and self._keeps_guesses:
            self._early[layer] = guess.detach().to(torch.int32, copy=True)

    def end(self) -> None:
        """
        The open pass is complete.

        Raises:
            TraceError: its layers computed different numbers of tokens.
        """
        if self._now is None:
            return  # recording began in the middle of it
        (sequences, kinds), self._now = self._now, None
        rows = len(kinds)
        top_k = max(one.shape[1] for one in (*self._chosen.values(), *self._early.values()))
        experts = np.full((rows, len(self._num_experts), top_k), -1, dtype=np.int16)
        scores = np.zeros(experts.shape if self._keeps_scores else (0, 0, 0), dtype=np.float16)
        for layer, chosen in self._chosen.items():
            if chosen.shape[0] != rows:
                raise TraceError(
                    f"one forward pass computed {rows} tokens in one layer and {chosen.shape[0]} "
                    "in another, which a trace cannot hold; this model cannot be traced"
                )
            ids = known_ids(chosen.cpu().numpy(), self._num_experts[layer])
            experts[:, layer, : ids.shape[1]] = ids
            if self._keeps_scores:
                weights = self._weights[layer].cpu().numpy()
                scores[:, layer, : ids.shape[1]] = np.where(ids >= 0, weights, 0)
        early = np.full(experts.shape if self._keeps_guesses else (0, 0, 0), -1, dtype=np.int16)
        for layer, guess in self._early.items():
            ids = known_ids(guess.cpu().numpy(), self._num_experts[layer])
            early[:, layer, : ids.shape[1]] = ids
        self._guesses.append(early)
        self._passes.append(experts)
        self._scores.append(scores)
        self._sequences.append(sequences)
        self._kinds.append(kinds)

    def drop(self) -> None:
        """Forget the open pass."""
        self._now = None

    def trace(self, note: str = "") -> Trace:
        """
        Everything recorded so far.

        Raises:
            TraceError: nothing was.
        """
        if not self._passes:
            raise TraceError("nothing was recorded; run the model inside `with handle.record()`")
        top_k = max(experts.shape[2] for experts in self._passes)

        def pad(passes: list[np.ndarray], value: int) -> np.ndarray:
            widths = [((0, 0), (0, 0), (0, top_k - e.shape[2])) for e in passes]
            return np.concatenate(
                [np.pad(e, w, constant_values=value) for e, w in zip(passes, widths, strict=True)]
            )

        lengths = [len(experts) for experts in self._passes]
        return Trace(
            experts=pad(self._passes, -1),
            scores=pad(self._scores, 0) if self._keeps_scores else None,
            guesses=pad(self._guesses, -1) if self._keeps_guesses else None,
            forward=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            sequence=np.concatenate(self._sequences).astype(np.int32),
            kind=np.concatenate(self._kinds),
            num_experts=max(self._num_experts),
            model=self._model,
            fingerprint=self._fingerprint,
            versions=_versions(),
            note="; ".join(filter(None, (self._note, note))),
        )


def _versions() -> Mapping[str, str]:
    return {name: version_of(name) for name in ("melinoe", "torch", "transformers")}
