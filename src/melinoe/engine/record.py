"""Record what a model's routers choose while it runs, or only count it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.trace import Trace, known_ids
from melinoe.config.names import version_of
from melinoe.engine.passes import Batch, rows_of
from melinoe.errors import AttachError, TraceError


class Recorder:
    """
    Collects one row per token of each forward pass; see `Trace`.

    Each row of a batch that begins a prompt is a sequence of its own; beams count as such rows.

    Args:
        num_experts: Of each MoE layer.
        model: Its name, for people.
        fingerprint: Of the weights that choose.
        guesses: Whether to keep what the next layer's router said early.
        note: What a reader of the trace must know of how it came about.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        model: str,
        fingerprint: str,
        *,
        guesses: bool = False,
        note: str = "",
    ) -> None:
        self._num_experts = tuple(num_experts)
        self._model, self._fingerprint, self._note = model, fingerprint, note
        self._keeps_guesses = guesses
        # Of the open pass, by layer.
        self._chosen: dict[int, Tensor] = {}
        self._early: dict[int, Tensor] = {}
        # Of each pass that has ended.
        self._passes: list[np.ndarray] = []
        self._guesses: list[np.ndarray] = []
        self._sequences: list[np.ndarray] = []
        self._kinds: list[np.ndarray] = []
        self._now: tuple[np.ndarray, np.ndarray] | None = None
        self._base = 0  # sequence number of the first row of the batch that is running
        self._batch = 0  # rows of that batch

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """Begin a pass; see `melinoe.engine.passes.Listener`."""
        batch = call.batch if call is not None else 1
        if phase == PROMPT and not (call is not None and call.continues and self._batch == batch):
            self._base += self._batch
            self._batch = batch
        rows, kinds = rows_of(call, phase, tokens)
        self._now = (rows + np.int32(self._base), kinds)
        self._chosen, self._early = {}, {}

    def add(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> None:
        """Keep a copy on the device; it is brought to the host at the end of the pass."""
        if self._now is not None:
            self._chosen[layer] = top_k_index.detach().to(torch.int32, copy=True)

    def add_guess(self, layer: int, guess: Tensor) -> None:
        """The router of *layer* was asked early, and said *guess* ``(tokens, top_k)``."""
        if self._now is not None and self._keeps_guesses:
            self._early[layer] = guess.detach().to(torch.int32, copy=True)

    def end(self) -> None:
        """
        Bring the pass to the host.

        Raises:
            TraceError: its layers computed different numbers of tokens.
        """
        if self._now is None:
            return  # recording began in the middle of it
        (sequences, kinds), self._now = self._now, None
        rows = len(kinds)
        top_k = max(one.shape[1] for one in (*self._chosen.values(), *self._early.values()))
        shape = rows, len(self._num_experts), top_k
        experts = np.full(shape, -1, dtype=np.int16)
        early = np.full(shape if self._keeps_guesses else (0, 0, 0), -1, dtype=np.int16)
        for layer, chosen in self._chosen.items():
            if chosen.shape[0] != rows:
                raise TraceError(
                    f"one forward pass computed {rows} tokens in one layer and {chosen.shape[0]} "
                    "in another, which a trace cannot hold; this model cannot be traced"
                )
            ids = self._known(layer, chosen)
            experts[:, layer, : ids.shape[1]] = ids
        for layer, guess in self._early.items():
            ids = self._known(layer, guess)
            early[:, layer, : ids.shape[1]] = ids
        self._guesses.append(early)
        self._passes.append(experts)
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

    def _known(self, layer: int, ids: Tensor) -> np.ndarray:
        return known_ids(ids.cpu().numpy(), self._num_experts[layer])


class UseMeter:
    """
    Counts how often each expert is chosen in one phase, without keeping who chose it when.

    Padding counts nowhere. Counting stays on the device that the choices are on, and waits for
    nothing until `counts`.

    Args:
        num_experts: Of each MoE layer.
        phase: `COMPLETION`; or `PROMPT`, of one sequence.
    """

    def __init__(self, num_experts: Sequence[int], phase: int = COMPLETION) -> None:
        self._num_experts, self._phase = tuple(num_experts), phase
        self._uses: dict[int, Tensor] = {}
        self._now: dict[int, Tensor] | None = None
        self._skipped: Tensor | None = None

    def begin(self, phase: int, tokens: int, call: Batch | None) -> None:
        """
        Begin a pass; those of the other phase are not counted.

        Raises:
            AttachError: several prompts came together.
        """
        self._now, self._skipped = None, None
        if phase != self._phase:
            return
        if phase == PROMPT and call is not None and call.batch > 1:
            raise AttachError(
                f"a prefetch for a prompt serves one sequence at a time and {call.batch} came "
                "together; generate from one prompt after the other, or prefetch by next-router"
            )
        self._now = {}
        if call is None or tokens != call.batch * call.length:
            return
        self._skipped = call.padding()
        if phase == PROMPT and call.prompt < call.length:  # guesses come with the prompt's end
            if self._skipped is None:
                self._skipped = torch.zeros(call.batch, call.length, dtype=torch.bool, device="cpu")
            self._skipped = self._skipped.clone()
            self._skipped[:, call.prompt :] = True

    def add(self, layer: int, top_k_index: Tensor, top_k_weights: Tensor | None = None) -> None:
        """Keep a copy of the choices, which the engine may renumber."""
        if self._now is not None:
            self._now[layer] = top_k_index.detach().to(torch.int64, copy=True)

    def end(self) -> None:
        """Count the pass."""
        for layer, ids in (self._now or {}).items():
            experts = self._num_experts[layer]
            # One place more, for what is no expert: skip slots and padding.
            ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
            if self._skipped is not None and self._skipped.numel() == ids.shape[0]:
                ids = torch.where(self._skipped.to(ids.device).reshape(-1, 1), experts, ids)
            if layer not in self._uses:
                self._uses[layer] = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
            flat = ids.reshape(-1)
            self._uses[layer].scatter_add_(0, flat, torch.ones_like(flat))
        self._now = None

    def drop(self) -> None:
        """Forget the open pass."""
        self._now = None

    def counts(self) -> np.ndarray:
        """Uses so far, int64 ``(layers, most experts of a layer)``; waits for the device."""
        found = np.zeros((len(self._num_experts), max(self._num_experts)), np.int64)
        for layer, uses in self._uses.items():
            found[layer, : self._num_experts[layer]] = uses[:-1].cpu().numpy()
        return found


def _versions() -> Mapping[str, str]:
    return {name: version_of(name) for name in ("melinoe", "torch", "transformers")}
