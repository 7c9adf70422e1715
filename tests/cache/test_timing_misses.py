"""The time model: misses that the host computes, or shares with the link, worked by hand."""

import pytest
from cache_traces import random_trace
from timed_steps import SLOW, WORK, run

from melinoe.cache.simulator import simulate
from melinoe.cache.timing import Machine, Work, computed_s, loads_when, predict, transfer_s


def test_misses_computed_by_the_host_worked_by_hand():
    """3 experts of 100 B at 20 kB/s: 15 ms, and 2 ms for activations; the hit is 1 ms of device."""
    machine = Machine(**SLOW, dram_bytes_per_s=2e4)
    timing = predict(run([[0]], [[4]], on_host=[[3]]), machine, WORK)
    assert timing.pass_s == pytest.approx([0.004 + 0.017 + 0.001])
    assert (timing.host_s[0], timing.link_s[0]) == (pytest.approx(0.017), 0)
    assert timing.metrics()["cpu_stall_ms_per_token"] == pytest.approx(17)


def test_a_split_makes_the_slower_side_fastest():
    """
    Of 4 missing: k loads take 11k ms, the host 5(4-k) + 2 ms (0 for none).

    k = 0: 22; 1: max(11, 17) = 17; 2: max(22, 12) = 22; so one is loaded. Of 2 missing: 12 on the
    host, or 11 with one load. Of 1: 7 on the host, 11 over the link: none. Of equals the load wins.
    """
    machine = Machine(**SLOW, dram_bytes_per_s=2e4)
    split = loads_when("split", machine, WORK)
    assert [split([1] * n) for n in range(5)] == [0, 0, 1, 1, 1]
    even = Machine(link_bytes_per_s=1e4, device_bytes_per_s=1e5, dram_bytes_per_s=1e4)
    assert [loads_when("split", even, WORK)([1] * n) for n in (1, 2, 3)] == [1, 1, 2]
    timing = predict(run([[1]], [[4]], on_host=[[3]]), machine, WORK)
    assert timing.host_s == pytest.approx([0.017]) and timing.link_s == pytest.approx([0.0])
    assert transfer_s(machine, WORK) == pytest.approx(0.011)
    assert computed_s(machine, WORK, 3) == pytest.approx(0.017)


def test_activations_travel_both_ways_and_rows_are_computed_one_by_one():
    """
    Two experts of 100 B at 20 kB/s: 10 ms; chosen 5 times by 3 tokens: 3 more rows of 1 ms.

    3 rows of 50 B go over and 5 come back: 400 B on 10 kB/s are 40 ms, and twice 1 ms of latency.
    The one load's copy, 3 ms, is made by the same thread, which also takes 4 once.
    """
    machine = Machine(**SLOW, dram_bytes_per_s=2e4, host_row_s=1e-3, copy_s=3e-3, host_call_s=4e-3)
    work = Work(expert_bytes=100, activation_bytes=50, backbone_bytes=300, kv_bytes=100)
    assert computed_s(machine, work, 2, 5, 3) == pytest.approx(
        0.004 + 0.010 + 0.003 + 0.040 + 0.002
    )
    done = run([[1]], [[4]], on_host=[[2]], tokens=[3])
    done.steps.on_host_uses[:] = 5
    assert predict(done, machine, work).host_s == pytest.approx([0.059 + 0.003])


def test_a_prompt_s_misses_are_loaded_where_a_token_s_are_computed():
    """One row costs the host 5 + 2 ms and the link 11; twenty rows cost 5 + 19 + 2: load it."""
    machine = Machine(**SLOW, dram_bytes_per_s=2e4, host_row_s=1e-3)
    split = loads_when("split", machine, WORK)
    assert (split([1]), split([20])) == (0, 1)
    # Two, one of them used once: the link brings the other meanwhile.
    assert split([1, 20]) == 1


def test_handling_misses_on_the_host_is_simulated_as_it_is_timed():
    """No loads with `cpu`; with `split` some, and every missing expert is one or the other."""
    trace = random_trace(0, completion=40)
    machine = Machine(**SLOW, dram_bytes_per_s=1e4)
    wanted = {sequence: [[0, 1, 2]] * 2 for sequence in range(3)}
    found = {}
    for miss in ("wait", "cpu", "split"):
        load = loads_when(miss, machine, WORK)
        found[miss] = simulate(trace, 3, prefetch=wanted, load=load, steps=True)
    assert found["cpu"].counters.loads.sum() == 0 < found["split"].counters.loads.sum()
    steps = found["split"].steps
    assert (steps.loads + steps.on_host <= steps.experts).all() and steps.on_host.any()
    assert not found["wait"].steps.on_host.any()
