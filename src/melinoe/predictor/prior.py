"""
Prior: what was served lately, so that a prefetch follows the traffic.

A predictor knows the prompts that it was fitted to. Traffic drifts: other users, other subjects. A
prior keeps, for each key (a user, a deployment), how the completions of its last requests used the
experts of each layer; each request makes all before it count a little less.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from melinoe.errors import ModelError
from melinoe.predictor.prior_file import PriorContents, read_prior, write_prior
from melinoe.predictor.targets import Floats, shares, top_ids

DEPLOYMENT = ""  # the key of those who tell no users apart


@dataclass(frozen=True)
class PriorSettings:
    """
    How a prior learns.

    Attributes:
        half_life: Requests of a key after which a request counts half.
        strength: What was known before the traffic counts as much as so many requests.
        max_keys: Keys that are kept; of more, the longest unused leaves.
    """

    half_life: float = 8.0
    strength: float = 2.0
    max_keys: int = 1024

    def __post_init__(self) -> None:
        if not 0 < self.half_life < float("inf"):
            raise ValueError(f"half_life must be above 0 and finite, got {self.half_life}")
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"strength must be above 0 and finite, got {self.strength}")
        if self.max_keys < 1:
            raise ValueError(f"max_keys must be 1 or more, got {self.max_keys}")


class Prior:
    """
    Exponentially decayed use of the experts, by key and layer.

    Per key and layer it holds a sum of shares ``s`` and a weight ``n``, both zero at first. A
    served completion with shares of use ``u`` makes them ``d s + u`` and ``d n + 1``, where
    ``d = 2 ** (-1 / half_life)``; a layer that the completion did not use stays as it is.

    Like the model, it serves one thread at a time. A key costs ``layers x experts`` numbers, and
    there are never more than ``settings.max_keys``.

    Args:
        num_layers: MoE layers.
        num_experts: Experts of each.
        fingerprint: Of the model that is served; no other may use it.
        settings: ``None`` means the defaults.

    Attributes:
        enabled: Whether it is in use. Off, it observes nothing and changes no prediction; what it
            has learned stays, until `reset`.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        fingerprint: str,
        settings: PriorSettings | None = None,
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.fingerprint = fingerprint
        self.settings = settings or PriorSettings()
        self.enabled = True
        self._known: OrderedDict[str, tuple[Floats, Floats]] = OrderedDict()  # oldest first

    # --- learning -------------------------------------------------------------------------------

    def observe(self, key: str, usage: NDArray) -> None:
        """
        Learn from a completion that was served for *key*.

        Args:
            key: Whose; ``""`` where users are not told apart.
            usage: How often it chose each expert, ``(layers, num_experts)``, 0 or more; one that
                chose none, having only one token, teaches nothing.

        Raises:
            ValueError: *usage* of another shape, negative or no number.
        """
        counts = np.asarray(usage, np.float64)
        if counts.shape != (self.num_layers, self.num_experts):
            raise ValueError(
                f"usage must be of shape {(self.num_layers, self.num_experts)}, got {counts.shape}"
            )
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise ValueError("usage must be numbers of 0 or more")
        used = counts.sum(axis=1) > 0
        if not self.enabled or not used.any():
            return
        total, weight = self._known.get(key) or self._nothing()
        decay = 0.5 ** (1 / self.settings.half_life)
        factor = np.where(used, decay, 1.0)
        self._known[key] = (total * factor[:, None] + shares(counts), weight * factor + used)
        self._known.move_to_end(key)
        while len(self._known) > self.settings.max_keys:
            self._known.popitem(last=False)

    def reset(self, key: str | None = None) -> None:
        """Forget *key*, or all keys; a key that is not known is no error."""
        if key is None:
            self._known.clear()
        else:
            self._known.pop(key, None)

    # --- predicting -----------------------------------------------------------------------------

    def adapted(self, key: str, popularity: NDArray) -> Floats:
        """
        What *key* will use, whatever the prompt: ``(s + strength p) / (n + strength)``.

        Args:
            key: Whose.
            popularity: ``p``, what is known without the traffic, ``(layers, num_experts)``.

        Returns:
            float64 ``(layers, num_experts)``; *popularity* itself where nothing was observed.
        """
        strength = self.settings.strength
        total, weight = self._of(key)
        return (total + strength * np.asarray(popularity)) / (weight + strength)[:, None]

    def adjust(self, predicted: NDArray, key: str, popularity: NDArray) -> Floats:
        """
        Correct what a predictor says by what the traffic says.

        *predicted* is multiplied by ``adapted / popularity``: what the prompt told beyond the
        predictor's own popularity stays, that popularity is replaced. Where nothing was observed
        nothing changes.

        Args:
            predicted: Distributions ``(layers, num_experts)``.
            key: Whose.
            popularity: The predictor's.

        Returns:
            float64 ``(layers, num_experts)``; each layer sums to 1.
        """
        rare = 1 / (32 * self.num_experts)  # keeps experts that were never seen from exploding
        known = np.asarray(popularity, np.float64)
        scores = np.asarray(predicted) * (self.adapted(key, known) + rare) / (known + rare)
        return scores / scores.sum(axis=1, keepdims=True)

    def top(self, key: str, slots: int) -> list[list[int]]:
        """
        Name the *slots* experts of each layer that *key* used most, the most used first.

        An expert that it has not used is not named, so a new key gets empty lists.
        """
        total, _ = self._of(key)
        best = top_ids(total, slots)
        return [[int(e) for e in row if total[layer, e] > 0] for layer, row in enumerate(best)]

    def keys(self) -> list[str]:
        """Known keys, the longest unused first."""
        return list(self._known)

    def requests(self, key: str) -> float:
        """How many requests of *key* still count, each by its weight; 0 for an unknown key."""
        return float(self._of(key)[1].max(initial=0.0))

    def _nothing(self) -> tuple[Floats, Floats]:
        return np.zeros((self.num_layers, self.num_experts)), np.zeros(self.num_layers)

    def _of(self, key: str) -> tuple[Floats, Floats]:
        if not self.enabled or key not in self._known:
            return self._nothing()
        self._known.move_to_end(key)
        return self._known[key]

    # --- the file -------------------------------------------------------------------------------

    def check_model(self, fingerprint: str, num_layers: int, num_experts: int) -> None:
        """
        Make sure that it was learned on this model.

        Raises:
            ModelError: it was not.
        """
        mine, theirs = (self.num_layers, self.num_experts), (num_layers, num_experts)
        if mine != theirs or self.fingerprint != fingerprint:
            raise ModelError(
                f"the prior was learned on model {self.fingerprint[:12]} ({mine[0]} layers of "
                f"{mine[1]} experts), not on {fingerprint[:12]} ({theirs[0]} of {theirs[1]}); "
                "start another one for this model"
            )

    def save(self, path: str | Path) -> None:
        """
        Write one safetensors file, whole or not at all; one already there is replaced.

        Raises:
            WriteError: the place cannot be written to.
        """
        settings = self.settings
        write_prior(
            path,
            PriorContents(
                fingerprint=self.fingerprint,
                half_life=settings.half_life,
                strength=settings.strength,
                max_keys=settings.max_keys,
                keys=self.keys(),
                total=np.stack([t for t, _ in self._known.values()])
                if self._known
                else np.zeros((0, self.num_layers, self.num_experts)),
                weight=np.stack([w for _, w in self._known.values()])
                if self._known
                else np.zeros((0, self.num_layers)),
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> Prior:
        """
        Read what `save` wrote.

        Raises:
            DataError: there is none.
            CheckpointError: it is torn, no prior, or of another version.
        """
        found = read_prior(path)
        settings = PriorSettings(found.half_life, found.strength, found.max_keys)
        _, num_layers, num_experts = found.total.shape
        prior = cls(num_layers, num_experts, found.fingerprint, settings)
        for key, total, weight in zip(found.keys, found.total, found.weight, strict=True):
            prior._known[key] = (total.astype(np.float64), weight.astype(np.float64))
        return prior
