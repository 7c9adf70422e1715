"""Prefetch what the most similar stored prompts used."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from melinoe.cache.prefetcher import ByLayer, Given, Prompt, Timed, most_wanted
from melinoe.config import PREFETCH_AT
from melinoe.errors import MelinoeError, ModelError
from melinoe.prefetch.store import PromptStore, prompt_embedding

NEIGHBOURS = 4


class Nearest(Timed):
    """
    The experts that the completions of the nearest stored prompts used, the most used first.

    Near is the cosine between mean token embeddings, both less the mean over the store. The shares
    of use of the nearest prompts are added up, layer by layer, equally weighted; experts that none
    of them used are not named, and of equally used ones the lower id comes first.

    Args:
        store: Prompts and what they used.
        at: As `Timed`.
        neighbours: How many prompts are asked; at most as many as the store has.

    Raises:
        ValueError: *neighbours* below 1.

    Source:
        MoE-Infinity, Xue et al., arXiv:2401.14361: the sequence's activations so far are matched
        with stored ones. Here prompts are matched, before anything ran.
    """

    name = "nearest"
    uses_ids = True

    def __init__(
        self, store: PromptStore, at: str = PREFETCH_AT, neighbours: int = NEIGHBOURS
    ) -> None:
        super().__init__(at)
        if neighbours < 1:
            raise ValueError(f"neighbours must be 1 or more, got {neighbours}")
        self.store = store
        self._count = min(neighbours, len(store))
        self._mean = store.embeddings.mean(axis=0)
        self._directions = _unit(store.embeddings - self._mean)
        totals = store.uses.sum(axis=2, keepdims=True)
        self._shares = store.uses / np.maximum(totals, 1)
        self._embed: Callable[[Sequence[int]], np.ndarray] | None = None
        self._model: weakref.ref[Any] | None = None

    @classmethod
    def make(cls, given: Given) -> Nearest:
        """As `Prefetcher.make`."""
        if given.store is None:
            raise MelinoeError(
                "prefetch 'nearest' needs prompts to compare with; give --nearest (see `melinoe "
                "prefetch store`)"
            )
        store = given.store if isinstance(given.store, PromptStore) else None
        return cls(store or PromptStore.load(Path(given.store)), given.at or PREFETCH_AT)

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """
        Read prompts with the model's own token embeddings.

        Raises:
            ModelError: the store is of another model.
        """
        if self._model is not None and self._model() is model:
            return
        from melinoe.moe.routing import fingerprint

        found = fingerprint(model)
        if found != self.store.fingerprint:
            raise ModelError(
                f"these stored prompts are of model {self.store.fingerprint[:12]}, not of "
                f"{found[:12]}; trace this model and store its prompts"
            )
        weight = model.get_input_embeddings().weight
        self._embed = lambda ids: prompt_embedding(weight, ids)
        self._model = weakref.ref(model)

    def neighbours(self, ids: Sequence[int]) -> list[int]:
        """
        The nearest stored prompts, nearest first.

        Raises:
            ModelError: not bound to a model.
            TokenizerError: an id that the model does not know.
        """
        if self._embed is None:
            raise ModelError("stored prompts are compared by the model's embeddings; bind one")
        likeness = self._directions @ _unit(self._embed(ids) - self._mean)
        return np.argsort(-likeness, kind="stable")[: self._count].tolist()

    def named(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        assert prompt.ids is not None
        wanted = self._shares[self.neighbours(prompt.ids)].sum(axis=0)
        return most_wanted(wanted, max(prompt.slots))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Scaled to length 1, float64; a vector of zeros stays one."""
    vectors = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)
