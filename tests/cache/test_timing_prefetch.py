"""The time model: prefetches that travel while layers compute, each worked by hand."""

import pytest
from timed_steps import SLOW, WORK, run

from melinoe.cache.timing import Machine, predict


def test_a_prefetch_between_layers_comes_while_the_layer_before_computes():
    """
    Two layers of one resident expert each, the second's on its way for 11 ms since 2 ms.

    Layer 0: 2 ms, then the prefetch is issued, then 1 ms. Layer 1: 2 ms until 5, 8 more until it
    has arrived, 1 to compute.
    """
    timing = predict(run([[0, 0]], [[1, 1]], between=[[0, 1]]), Machine(**SLOW), WORK)
    assert timing.pass_s == pytest.approx([0.014])
    assert timing.link_s == pytest.approx([0.008])
    assert timing.transferred_bytes == 100


def test_a_prefetch_over_a_layer_that_is_left_out_comes_while_the_one_before_it_computes():
    """
    Three layers, the second without a request; the third's expert is on its way for 11 ms.

    All else takes 4/3 ms a layer. It is issued then, and computed with once it is there, for 1 ms.
    """
    timing = predict(run([[0, 0, 0]], [[1, 0, 1]], between=[[0, 0, 1]]), Machine(**SLOW), WORK)
    assert timing.pass_s == pytest.approx([0.001 * (4 / 3 + 11 + 1)])


def test_a_prefetch_travels_while_layers_compute():
    """
    Two prefetches before the pass, one per layer, copies of 1 ms: 2 ms are spent issuing.

    The link brings them at 11 and 22 ms. Layer 0 begins at 2, computes 2 for all else, waits until
    11 for its hits, ends at 15; layer 1 is at 17 when its prefetch is 5 ms away: 22 + 4 = 26 ms.
    """
    machine = Machine(**SLOW, copy_s=0.001)
    timing = predict(run([[0, 0]], [[4, 4]], ahead=[[1, 1]]), machine, WORK)
    assert timing.pass_s == pytest.approx([0.026])
    assert timing.ahead_s == pytest.approx([0.002])
    assert timing.link_s == pytest.approx([0.007 + 0.005])


def test_a_load_on_demand_queues_behind_a_prefetch():
    """The link is busy until 22 ms; layer 0 has no hit, asks at 2 and has its load at 33."""
    timing = predict(run([[4, 0]], [[4, 4]], ahead=[[0, 2]]), Machine(**SLOW), WORK)
    # At 2 ms: 20 of queue and 4 transfers of 11; then 4 of compute; layer 1's came long ago.
    assert timing.link_s == pytest.approx([0.020 + 0.044])
    assert timing.pass_s == pytest.approx([0.002 + 0.064 + 0.004 + 0.006])


def test_a_prefetch_that_came_in_time_costs_nothing_later():
    """Issued before pass 0, used in pass 1, when it has long arrived."""
    loads, experts = [[0, 0], [0, 0]], [[4, 0], [4, 4]]
    timing = predict(run(loads, experts, ahead=[[0, 1], [0, 0]]), Machine(**SLOW), WORK)
    assert timing.link_s == pytest.approx([0.0, 0.0])
