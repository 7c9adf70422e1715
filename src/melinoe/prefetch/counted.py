"""Prefetch by counts: of other texts (popularity), or of the prompt itself (prefill)."""

from __future__ import annotations

import numpy as np

from melinoe.cache.prefetcher import ByLayer, Given, Prefetcher, Prompt, Timed, most_wanted
from melinoe.config import PREFETCH_AT
from melinoe.errors import MelinoeError


class Popularity(Timed):
    """
    The experts that were chosen most often elsewhere, whatever the prompt; ties to the lower id.

    Those that were never chosen there are not named.

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
        self._counts = counts

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
        """At most as many of each layer as there are slots."""
        layers, experts = self._counts.shape
        if layers != len(prompt.slots) or experts != prompt.num_experts:
            raise MelinoeError(
                f"the popularity is of another model: it has {layers} layers of {experts} experts, "
                f"and the model {len(prompt.slots)} of {prompt.num_experts}; count this model's"
            )
        return most_wanted(self._counts, max(prompt.slots))


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
        return most_wanted(prompt.uses, max(prompt.slots))
