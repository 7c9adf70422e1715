"""Prefetch by counts: of other texts (popularity), or of the prompt itself (prefill)."""

from __future__ import annotations

import numpy as np

from melinoe.cache.prefetcher import ByLayer, Given, Prefetcher, Prompt, Timed
from melinoe.config import PREFETCH_AT
from melinoe.errors import MelinoeError


class Popularity(Timed):
    """
    The experts that were chosen most often elsewhere, whatever the prompt; ties to the lower id.

    Args:
        popularity: How often, (layers, num_experts).
        at: As `Timed`.

    Raises:
        ValueError: another shape.

    Source:
        Static placement by popularity: Fiddler, arXiv:2402.07033.
    """

    name = "popularity"

    def __init__(self, popularity: np.ndarray, at: str = PREFETCH_AT) -> None:
        super().__init__(at)
        counts = np.asarray(popularity)
        if counts.ndim != 2:
            raise ValueError(f"a popularity has layers and experts, not the shape {counts.shape}")
        self._order = np.argsort(-counts, axis=1, kind="stable")

    @classmethod
    def make(cls, given: Given) -> Popularity:
        """As `Prefetcher.make`."""
        if given.popularity is None:
            raise MelinoeError(
                "prefetch 'popularity' needs to know which experts are popular; give --popularity "
                "(a trace or statistics) or --predictor"
            )
        return cls(given.popularity, given.at or PREFETCH_AT)

    def named(self, prompt: Prompt) -> ByLayer:
        """As many of each layer as it has slots."""
        layers, experts = self._order.shape
        if layers != len(prompt.slots) or experts != prompt.num_experts:
            raise MelinoeError(
                f"the popularity is of another model: it has {layers} layers of {experts} experts, "
                f"and the model {len(prompt.slots)} of {prompt.num_experts}; count this model's"
            )
        return self._order[:, : max(prompt.slots)].tolist()


class Prefill(Prefetcher):
    """
    The experts that the prompt's own tokens chose, the most used first, ties to the lower id.

    They are known once the prompt was read, and cost nothing to know. What the prompt's pass left
    resident is not loaded again; this brings back what it evicted.

    Source:
        Prompt-aware placement at the end of prefill is folklore of MoE serving; we know of no
        first source.
    """

    name = "prefill"

    def before_completion(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        assert prompt.uses is not None
        order = np.argsort(-prompt.uses, axis=1, kind="stable")
        most = max(prompt.slots)
        return [
            [expert for expert in ids[:most] if uses[expert]]
            for ids, uses in zip(order.tolist(), prompt.uses.tolist(), strict=True)
        ]
