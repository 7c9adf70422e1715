"""Record what a model's routers choose while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.counters import PROMPT
from melinoe.cache.trace import PROMPT_ROW, Trace, known_ids
from melinoe.config.names import version_of
from melinoe.engine.passes import Batch, rows_of
from melinoe.errors import AttachError, TraceError


class Recorder:
    """Collects one row per token of each pass; a sequence for each row that begins a prompt."""

    def __init__(
        self, num_experts: Sequence[int], model: str = "", fingerprint: str = "", note: str = ""
    ) -> None:
        self._num_experts = tuple(num_experts)
        self._model, self._fingerprint, self._note = model, fingerprint, note
        # Of the open pass: choices by layer, on the device; its rows.
        self._chosen: dict[int, Tensor] = {}
        self._now: tuple[np.ndarray, np.ndarray] | None = None
        # Of each pass that has ended: choices, sequences, kinds.
        self._passes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._base = 0  # sequence number of the first row of the batch that is running
        self._batch = 0  # rows of that batch

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """Begin a pass of *tokens* rows, within *call* if the model was called as a whole."""
        if phase == PROMPT and (call is None or call.begins_text(self._batch)):
            self._base += self._batch
            self._batch = 1 if call is None else call.batch
        rows, kinds = rows_of(call, phase, tokens)
        self._now = (rows + np.int32(self._base), kinds)
        self._chosen = {}

    def add(self, layer: int, top_k_index: Tensor) -> None:
        """Keep a copy on the device; it is brought to the host at the end of the pass."""
        if self._now is not None:
            self._chosen[layer] = top_k_index.detach().to(torch.int32, copy=True)

    def end(self) -> None:
        """Bring the pass to the host; TraceError if layers computed other numbers of tokens."""
        if self._now is None:
            return  # recording began in the middle of it
        (sequences, kinds), self._now = self._now, None
        for chosen in self._chosen.values():
            if chosen.shape[0] != len(kinds):
                raise TraceError(
                    f"one forward pass computed {len(kinds)} tokens in one layer and "
                    f"{chosen.shape[0]} in another, which a trace cannot hold; this model cannot "
                    "be traced"
                )
        self._passes.append((self._table(self._chosen, len(kinds)), sequences, kinds))

    def drop(self) -> None:
        """Forget the open pass."""
        self._now = None

    def trace(self, note: str = "") -> Trace:
        """Everything recorded so far; TraceError if nothing was."""
        if not self._passes:
            raise TraceError("nothing was recorded; run the model inside `with handle.record()`")
        tables, sequences, kinds = zip(*self._passes, strict=True)
        top_k = max(table.shape[2] for table in tables)
        wide = [
            np.pad(table, ((0, 0), (0, 0), (0, top_k - table.shape[2])), constant_values=-1)
            for table in tables
        ]
        lengths = [len(rows) for rows in kinds]
        return Trace(
            experts=np.concatenate(wide),
            forward=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            sequence=np.concatenate(sequences).astype(np.int32),
            kind=np.concatenate(kinds),
            num_experts=max(self._num_experts),
            model=self._model,
            fingerprint=self._fingerprint,
            versions=_versions(),
            note="; ".join(filter(None, (self._note, note))),
        )

    def _table(self, by_layer: Mapping[int, Tensor], rows: int) -> np.ndarray:
        """int16 ``(rows, layers, most choices)``; -1 where nothing was chosen."""
        width = max((ids.shape[1] for ids in by_layer.values()), default=0)
        table = np.full((rows, len(self._num_experts), width), -1, dtype=np.int16)
        for layer, ids in by_layer.items():
            known = known_ids(ids.cpu().numpy(), self._num_experts[layer])
            table[:, layer, : known.shape[1]] = known
        return table


class PromptUses(Recorder):
    """Counts which experts the tokens of one prompt chose, for a prefetcher."""

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """Begin a pass; AttachError if several prompts came together."""
        if phase == PROMPT and call is not None and call.batch > 1:
            raise AttachError(
                f"a prefetch for a prompt serves one sequence at a time and {call.batch} came "
                "together; generate from one prompt after the other"
            )
        super().begin(phase, tokens, call)

    def counts(self) -> np.ndarray:
        """Uses so far, int64 ``(layers, most experts of a layer)``."""
        found = np.zeros((len(self._num_experts), max(self._num_experts)), np.int64)
        for experts, _, kinds in self._passes:
            for layer, uses in enumerate(found):
                ids = experts[kinds == PROMPT_ROW, layer].reshape(-1)
                uses += np.bincount(ids[ids >= 0], minlength=len(uses))
        return found


def _versions() -> Mapping[str, str]:
    return {name: version_of(name) for name in ("melinoe", "torch", "transformers")}
