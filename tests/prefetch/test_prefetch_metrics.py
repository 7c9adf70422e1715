"""Precision, recall, waste and adjusted hit rate of a prefetch, worked by hand."""

import numpy as np
import pytest
from prefetch_traces import decoding

from melinoe.cache.prefetch import NextRouter, Popularity
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder


def test_precision_recall_waste_and_adjusted_hit_rate_by_hand():
    """
    One slot a layer, three tokens; guesses for layer 1: right, wrong, and of a resident.

    Layer 0 loads 0, then 1, then hits. Layer 1: 0 comes ahead and is used; 3 comes ahead over it
    and leaves unused for 2, on demand; 2 is guessed where it is already. So of two copied ahead
    one was used; of four misses one was spared; five copies for six uses.
    """
    trace = decoding([[[0], [0]], [[1], [2]], [[1], [2]]], [[0], [3], [2]])
    counters = simulate(trace, 1, prefetch=NextRouter()).counters
    assert counters.prefetch_loads.tolist() == [0, 2]
    assert counters.prefetch_used.tolist() == [[0, 0], [0, 1]]
    assert counters.loads[1].tolist() == [2, 1]
    assert counters.prefetch_precision() == 1 / 2
    assert counters.prefetch_recall() == 1 / 4
    assert counters.prefetch_unused.tolist() == [0, 1]
    assert counters.prefetch_waste_per_token() == 1 / 3
    assert counters.adjusted_hit_rate("completion") == pytest.approx(1 - 5 / 6)


def test_what_waits_for_its_first_use_is_not_used_yet():
    """Four prefetched before the prompt, which uses two: precision 1/2, and recall is of others."""
    builder = TraceBuilder(1, 8, 1)
    builder.add_forward(np.array([[[0]], [[1]]]), 0, 0)
    builder.add_forward(np.array([[[5]]]), 0, 1)
    done = simulate(builder.trace(), 4, prefetch=Popularity([[9, 8, 7, 6, 0, 0, 0, 0]], "prompt"))
    assert done.prefetch == "popularity"
    assert done.counters.prefetch_used.tolist() == [[2], [0]]
    assert (done.counters.prefetch_precision(), done.counters.prefetch_recall()) == (0.5, 0.0)
    nothing = simulate(builder.trace(), 4).counters
    assert (nothing.prefetch_precision(), nothing.prefetch_unused.tolist()) == (None, [0])


def test_a_use_is_first_only_once_and_a_load_on_demand_is_none():
    """2 is prefetched and used twice; then evicted and loaded on demand: one first use in all."""
    residency = Residency(4, 1)
    residency.prefetch([2])
    plans = [residency.request([expert]) for expert in (2, 2, 0, 2)]
    assert [plan.first_uses for plan in plans] == [1, 0, 0, 0]
    residency.check_invariants()
