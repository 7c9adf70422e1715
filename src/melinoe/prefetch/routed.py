"""Prefetch what the next layer's router says of the current hidden state."""

from __future__ import annotations

from collections.abc import Sequence

from melinoe.cache.prefetcher import Prefetcher


class NextRouter(Prefetcher):
    """
    The experts that the next layer's router chooses when it is shown what this layer's was shown.

    Issued while decoding, behind this layer's own loads and before its experts are computed, so
    that the next layer's come over the link meanwhile. A trace holds what the router said if it was
    recorded with guesses, and then the simulator replays it exactly.

    Source:
        Speculative loading: Eliseev and Mazur, arXiv:2312.17238.
    """

    name = "next-router"
    uses_guesses = True

    def after_router(
        self, layer: int, chosen: Sequence[int], guess: Sequence[int]
    ) -> Sequence[int]:
        """What the router said."""
        return guess
