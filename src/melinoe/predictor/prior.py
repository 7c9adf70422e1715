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

from melinoe.cache.prefetcher import most_wanted
from melinoe.errors import ModelError
from melinoe.predictor.prior_file import PriorContents, read_prior, write_prior
from melinoe.predictor.targets import Floats, shares

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

    Per key and layer it holds sums of shares that were used, ``s``, and that were predicted, ``q``,
    and a weight ``n``, all zero at first. A served completion with shares of use ``u``, for which
    ``p`` was predicted, makes them ``d s + u``, ``d q + p`` and ``d n + 1``, where
    ``d = 2 ** (-1 / half_life)``; a layer that the completion did not use stays as it is.

    Like the model, it serves one thread at a time. A key costs ``2 x layers x experts`` numbers,
    and there are never more than ``settings.max_keys``.

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
        # s, q and n of each key, the longest unused first.
        self._known: OrderedDict[str, tuple[Floats, Floats, Floats]] = OrderedDict()

    # --- learning -------------------------------------------------------------------------------

    def observe(self, key: str, usage: NDArray, predicted: NDArray | None = None) -> None:
        """
        Learn from a completion that was served for *key*.

        Args:
            key: Whose; ``""`` where users are not told apart.
            usage: How often it chose each expert, ``(layers, num_experts)``, 0 or more; one that
                chose none, having only one token, teaches nothing.
            predicted: What a predictor said of it, distributions of the same shape; absent, there
                was none, and this completion will correct none.

        Raises:
            ValueError: either of another shape, negative or no number.
        """
        counts = self._checked(usage, "usage")
        used_shares = shares(counts)
        said = used_shares if predicted is None else shares(self._checked(predicted, "predicted"))
        used = counts.sum(axis=1) > 0
        if not self.enabled or not used.any():
            return
        total, expected, weight = self._known.get(key) or self._nothing()
        decay = 0.5 ** (1 / self.settings.half_life)
        factor = np.where(used, decay, 1.0)
        self._known[key] = (
            total * factor[:, None] + used_shares,
            expected * factor[:, None] + said * used[:, None],
            weight * factor + used,
        )
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

    def adjust(self, predicted: NDArray, key: str) -> Floats:
        """
        Correct what a predictor says of a prompt by how wrong it lately was for *key*.

        *predicted* ``p`` is multiplied by ``(s + strength p) / (q + strength p)``, what was used
        over what was predicted, and scaled to sum to 1 again. So a predictor that knows its traffic
        is left alone, and where nothing was observed nothing changes.

        Args:
            predicted: Distributions ``(layers, num_experts)``.
            key: Whose.

        Returns:
            float64 ``(layers, num_experts)``; each layer sums to 1.
        """
        said, strength = np.asarray(predicted, np.float64), self.settings.strength
        total, expected, weight = self._of(key)
        # Keeps experts that were neither used nor predicted from exploding.
        rare = (weight + strength)[:, None] / (32 * self.num_experts)
        known = strength * said + rare
        scores = said * (total + known) / (expected + known)
        return scores / scores.sum(axis=1, keepdims=True)

    def top(self, key: str, slots: int) -> list[list[int]]:
        """
        Name the *slots* experts of each layer that *key* used most, the most used first.

        An expert that it has not used is not named, so a new key gets empty lists.
        """
        return most_wanted(self._of(key)[0], slots)

    def used(self, key: str) -> NDArray[np.bool_]:
        """Which experts *key* has used lately, ``(layers, num_experts)``."""
        return self._of(key)[0] > 0

    def keys(self) -> list[str]:
        """Known keys, the longest unused first."""
        return list(self._known)

    def requests(self, key: str) -> float:
        """How many requests of *key* still count, each by its weight; 0 for an unknown key."""
        return float(self._of(key)[2].max(initial=0.0))

    def _checked(self, table: NDArray, name: str) -> Floats:
        found, shape = np.asarray(table, np.float64), (self.num_layers, self.num_experts)
        if found.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {found.shape}")
        if not np.isfinite(found).all() or (found < 0).any():
            raise ValueError(f"{name} must be numbers of 0 or more")
        return found

    def _nothing(self) -> tuple[Floats, Floats, Floats]:
        shape = (self.num_layers, self.num_experts)
        return np.zeros(shape), np.zeros(shape), np.zeros(self.num_layers)

    def _of(self, key: str) -> tuple[Floats, Floats, Floats]:
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
        # With nothing in front the tables have their shapes where there are no keys, too.
        total, expected, weight = (
            np.stack([empty, *(one[table] for one in self._known.values())])[1:]
            for table, empty in enumerate(self._nothing())
        )
        write_prior(
            path,
            PriorContents(
                self.fingerprint,
                settings.half_life,
                settings.strength,
                settings.max_keys,
                self.keys(),
                total,
                expected,
                weight,
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
        tables = zip(found.keys, found.total, found.expected, found.weight, strict=True)
        for key, *three in tables:
            total, expected, weight = (table.astype(np.float64) for table in three)
            prior._known[key] = (total, expected, weight)
        return prior
