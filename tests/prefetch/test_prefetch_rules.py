"""What becomes of what is named: who is spared, who is asked when; no model."""

import numpy as np
import pytest
from prefetch_traces import decoding

from melinoe.cache.ahead import LoadsAhead, Route
from melinoe.cache.prefetch import NextRouter, Popularity, Prefetcher, Prompt
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from melinoe.errors import MelinoeError


def test_a_prefetch_spares_what_it_is_told_to_and_drops_what_finds_no_slot():
    """Slots hold 0, 1, 2; sparing 0 and 1, of the wanted 5 and 6 only 5 comes, over 2."""
    residency = Residency(8, 3)
    residency.request([0, 1, 2])
    plan = residency.prefetch([5, 6], spare=[0, 1])
    assert [(load.expert, load.evicted) for load in plan.loads] == [(5, 2)]
    assert residency.prefetch([6, 7], spare=[0, 1, 5]).loads == ()
    assert residency.prefetch([1, 6], spare=[0, 5]).loads == ()  # 1 is wanted itself
    residency.check_invariants()


class Both(Prefetcher):
    """Names 3 before the completion, and 2 between layers."""

    name = "both"

    def before_completion(self, prompt):
        return [[], [3]]

    def after_router(self, layer, chosen, guess):
        return [2]


def test_what_was_named_for_a_layer_stays_until_that_layer_has_asked():
    """One slot: 3, brought for the completion, is not evicted for 2 before layer 1 has run."""
    trace = decoding([[[0], [1]], [[0], [2]]], [[-1], [-1]])
    done = simulate(trace, 1, prefetch=Both(), steps=True)
    assert done.steps.ahead.tolist() == [[0, 1], [0, 0]]
    assert done.steps.between.tolist() == [[0, 0], [0, 1]]
    assert done.counters.prefetch_used.sum() == 1  # 2, in the second pass


def test_many_rows_are_not_asked_about():
    """Nine sequences decode together: one more than a prefetch between layers looks at."""
    for rows, loads in ((8, 8), (9, 0)):
        builder = TraceBuilder(2, 16, 1)
        early = np.full((rows, 2, 1), -1)
        early[:, 1, 0] = np.arange(rows)
        builder.add_forward(np.zeros((rows, 2, 1), int), np.arange(rows), 1, guesses=early)
        counters = simulate(builder.trace(), 16, prefetch=NextRouter()).counters
        assert counters.prefetch_loads.tolist() == [0, loads]


def test_between_layers_a_prompt_is_not_asked_about():
    """It hears of the completion's passes, of layers that ran, and never of the last."""
    builder = TraceBuilder(3, 4, 1)
    builder.add_forward(np.array([[[0], [1], [2]]]), 0, 0)
    builder.add_forward(np.array([[[0], [-1], [2]]]), 0, 1)
    heard = []

    class Ear(Prefetcher):
        def after_router(self, layer, chosen, guess):
            heard.append((layer, list(chosen), list(guess)))
            return ()

    simulate(builder.trace(), 2, prefetch=Ear())
    assert heard == [(0, [0], [])]


def test_wishes_must_name_every_layer():
    """One list for two layers is the prefetcher's mistake."""
    ahead = LoadsAhead(Popularity(np.ones((1, 4))), Route(2), 2, lambda *_: 0)
    with pytest.raises((ValueError, MelinoeError), match="layer"):
        ahead.before_completion(Prompt((2, 2), 4))
