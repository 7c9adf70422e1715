"""Prefetch what a fitted predictor names for the prompt."""

from __future__ import annotations

from typing import Any

from melinoe.cache.prefetcher import ByLayer, Given, Prompt, Timed
from melinoe.config import PREFETCH_AT
from melinoe.errors import MelinoeError


class Predicted(Timed):
    """
    The experts that a predictor finds likeliest for the prompt.

    Args:
        predictor: Has ``top(ids, slots)``: per layer the likeliest ids, likeliest first; and
            ``bind(model, tokenizer)``. Those of `melinoe.predictor` do, and so may others.
        at: As `Timed`.

    Source:
        Loading the predicted top experts of each layer before generation: arXiv:2602.11192.
    """

    name = "predictor"
    uses_ids = True

    def __init__(self, predictor: Any, at: str = PREFETCH_AT) -> None:
        super().__init__(at)
        self.predictor = predictor

    @classmethod
    def make(cls, given: Given) -> Predicted:
        """As `Prefetcher.make`."""
        if given.predictor is None:
            raise MelinoeError(
                "prefetch 'predictor' needs one; give --predictor (see `melinoe predictor fit`)"
            )
        return cls(given.predictor, given.at or PREFETCH_AT)

    def bind(self, model: Any, tokenizer: Any = None) -> None:
        """As `Prefetcher.bind`."""
        self.predictor.bind(model, tokenizer)

    def named(self, prompt: Prompt) -> ByLayer:
        """At most as many of each layer as there are slots."""
        assert prompt.ids is not None
        return self.predictor.top(prompt.ids, max(prompt.slots))
