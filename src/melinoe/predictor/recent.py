"""Name the experts that were used lately, and learn from each completion that is served."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from melinoe.cache.prefetch import most_wanted
from melinoe.cache.tensor_file import FileKind
from melinoe.errors import CheckpointError, ModelError
from melinoe.lock import held
from melinoe.moe.routing import find_routers, fingerprint
from melinoe.predictor.targets import Floats, shares

HALF_LIFE = 8.0  # completions after which one counts half
VERSION = 1
_WAY_OUT = "remove it, and begin another one"
_NOUN = "recent use"
_KIND = FileKind(
    "melinoe-recent-use", (VERSION,), f"the {_NOUN} {{}} is", _NOUN, _WAY_OUT, CheckpointError
)


class RecentUse:
    """
    Exponentially decayed use of each layer's experts, as a predictor that ignores the prompt.

    It holds sums of shares that were used, zero at first. A completion with shares of use ``u`` in
    a layer makes that layer's sums ``s`` into ``2 ** (-1 / HALF_LIFE) s + u``; a layer that the
    completion did not use stays as it is. Traffic drifts, and this follows it; a file per user
    keeps users apart. `melinoe.generate.generate` tells it of each completion.

    Args:
        num_layers: MoE layers.
        num_experts: Experts of the layer that has most.
        fingerprint: Of the model that is served; no other may use it.
    """

    def __init__(self, num_layers: int, num_experts: int, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.used: Floats = np.zeros((num_layers, num_experts))
        # Learned since the file was read: what that multiplies the sums by, and what it adds.
        self._factor, self._added = np.ones((num_layers, 1)), np.zeros_like(self.used)
        self._model: weakref.ref[nn.Module] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> RecentUse:
        """Begin one for *model*."""
        routers = find_routers(model)
        experts = max(router.num_experts for router in routers)
        return cls(len(routers), experts, fingerprint(model))

    def observe(self, usage: NDArray) -> None:
        """
        Learn from a completion that was served.

        Args:
            usage: How often it chose each expert, ``(layers, num_experts)``, 0 or more; one that
                chose none, having only one token, teaches nothing.

        Raises:
            ValueError: of another shape, negative or no number.
        """
        counts = np.asarray(usage, np.float64)
        if counts.shape != self.used.shape:
            raise ValueError(f"usage must be of shape {self.used.shape}, got {counts.shape}")
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError("usage must be numbers of 0 or more")
        used = counts.sum(axis=1, keepdims=True) > 0
        decay = np.where(used, 0.5 ** (1 / HALF_LIFE), 1.0)
        added = shares(counts)
        self.used = self.used * decay + added
        self._factor, self._added = self._factor * decay, self._added * decay + added

    def top(self, token_ids: Sequence[int], slots: int) -> list[list[int]]:
        """Name at most *slots* experts of each layer that were used, the most used first."""
        return most_wanted(self.used, slots)

    @property
    def completions(self) -> float:
        """Completions that still count, each by its weight."""
        # The shares of a completion add up to 1 in each layer that it used.
        return float(self.used.sum(axis=1).max())

    def bind(self, model: nn.Module, tokenizer: Any = None) -> None:
        """
        Check that it was learned on *model*.

        Raises:
            ModelError: it was learned on another model.
        """
        if self._model is None or self._model() is not model:
            self._check(RecentUse.of(model))
            self._model = weakref.ref(model)

    def _check(self, other: RecentUse) -> None:
        if self.used.shape != other.used.shape or self.fingerprint != other.fingerprint:
            mine, theirs = ("{} of {}".format(*one.used.shape) for one in (self, other))
            raise ModelError(
                f"the recent use was learned on model {self.fingerprint[:12]} ({mine} experts), "
                f"not on {other.fingerprint[:12]} ({theirs}); begin another one for this model"
            )

    def update(self, path: str | Path) -> None:
        """
        Add to the file what was learned since it was read, whoever has written to it meanwhile.

        The file is made if it does not exist. Waits for others that write to it, and knows
        afterwards what the file holds: their completions first, then its own.

        Raises:
            CheckpointError: the file is torn, of another kind, or of another version.
            ModelError: it is of another model.
            WriteError, TraceError: the place cannot be written to.
        """
        with held(path, wait=True):
            if Path(path).exists():
                there = RecentUse.load(path)
                there._check(self)
                self.used = there.used * self._factor + self._added
            header = {"version": VERSION, "fingerprint": self.fingerprint}
            _KIND.write(path, {"used": self.used.astype(np.float32)}, header)
        self._factor, self._added = np.ones_like(self._factor), np.zeros_like(self._added)

    @classmethod
    def load(cls, path: str | Path) -> RecentUse:
        """
        Read what `update` wrote, and check all of it.

        Raises:
            CheckpointError: it is missing, torn, of another kind, or of another version.
        """
        arrays, header, _ = _KIND.read(path)
        used, name = arrays.get("used"), header.get("fingerprint")
        fault = None
        if arrays.keys() != {"used"} or not isinstance(name, str):
            fault = "it does not hold one table of a named model"
        elif used is None or used.dtype != np.float32 or used.ndim != 2 or not used.size:
            fault = "its table is of another shape or type"
        elif not np.isfinite(used).all() or (used < 0).any():
            fault = "a use is negative or no number"
        if fault is not None or used is None:
            raise CheckpointError(f"the recent use {path} is malformed ({fault}); {_WAY_OUT}")
        recent = cls(used.shape[0], used.shape[1], str(name))
        recent.used = used.astype(np.float64)
        return recent
