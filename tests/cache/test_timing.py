"""The time model's formulas, each worked by hand."""

import numpy as np
import pytest
from cache_traces import random_trace

from melinoe.cache.counters import Counters
from melinoe.cache.prefetch import Listed
from melinoe.cache.simulator import Simulation, Steps, simulate
from melinoe.cache.timing import Machine, Work, computed_s, loads_when, predict, transfer_s
from melinoe.errors import HardwareError


def run(loads, experts, ahead=None, on_host=None, phase=None, tokens=None, unit=None):
    """A simulation of which only the steps matter; rows are passes, columns layers."""
    loads = np.array(loads, np.int32)
    zero = np.zeros_like(loads)
    steps = Steps(
        np.ones(len(loads), np.uint8) if phase is None else np.array(phase, np.uint8),
        np.ones(len(loads), np.int64) if tokens is None else np.array(tokens, np.int64),
        np.zeros(len(loads), np.int64) if unit is None else np.array(unit, np.int64),
        loads,
        np.array(experts, np.int32),
        zero if ahead is None else np.array(ahead, np.int32),
        zero if on_host is None else np.array(on_host, np.int32),
        np.zeros_like(loads) if on_host is None else np.array(on_host, np.int32),
    )
    layers = loads.shape[1]
    return Simulation(Counters(layers), [], [], (1,) * layers, "lru", steps=steps)


# A transfer takes 1 ms + 100 B / 10 kB/s = 11 ms; an expert is read in 1 ms, all else in 2 a layer.
SLOW = {"link_bytes_per_s": 1e4, "link_latency_s": 1e-3, "device_bytes_per_s": 1e5}

WORK = Work(expert_bytes=100, backbone_bytes=300, kv_bytes=100)


def test_waiting_for_loads_worked_by_hand():
    """Two layers, 4 experts each, 2 and 0 loads: (2 + 22 + 2 + 2) + (2 + 4) ms."""
    timing = predict(run([[2, 0]], [[4, 4]]), Machine(**SLOW), WORK)
    assert timing.pass_s == pytest.approx([0.034])
    assert timing.link_s == pytest.approx([0.022])
    assert timing.metrics()["tokens_per_s"] == pytest.approx(1 / 0.034)
    assert timing.transferred_bytes == 200


def test_copies_slower_than_the_link_are_not_hidden():
    """Each of 2 copies takes the host 15 ms, the link 11: 30 ms of stall."""
    timing = predict(run([[2, 0]], [[4, 4]]), Machine(**SLOW, copy_s=0.015), WORK)
    assert timing.link_s == pytest.approx([0.030])


def test_a_measured_pass_replaces_bytes():
    """10 ms with all resident, 1 ms for each further row: 10 + 22 and 12 ms."""
    machine = Machine(link_bytes_per_s=1e4, link_latency_s=1e-3, pass_s=0.010, row_s=0.001)
    timing = predict(run([[2, 0], [0, 0]], [[4, 4], [4, 4]], tokens=[1, 3]), machine, WORK)
    assert timing.pass_s == pytest.approx([0.032, 0.012])


def test_metrics_are_of_the_completion_and_the_prompt_s_are_ttft():
    """Two units, prompts of 34 and 12 ms: mean 23; one token each of 12 ms."""
    simulation = run(
        [[2, 0], [0, 0], [0, 0], [0, 0]],
        [[4, 4]] * 4,
        phase=[0, 1, 0, 1],
        tokens=[5, 1, 5, 1],
        unit=[0, 0, 1, 1],
    )
    metrics = predict(simulation, Machine(**SLOW), WORK).metrics()
    assert metrics["ttft_s"] == pytest.approx(0.023)
    assert metrics["ms_per_token"] == pytest.approx(12)
    assert metrics["stall_ms_per_token"] == 0
    nothing = predict(run(np.zeros((0, 2)), np.zeros((0, 2))), Machine(**SLOW), WORK).metrics()
    assert set(nothing.values()) == {None}


def test_time_is_never_below_the_limits():
    """On simulated traces: link bytes over its bandwidth, and memory bytes over the device's."""
    trace = random_trace(0, completion=40)
    machine, work = Machine(**SLOW), WORK
    for policy in ("lru", "lfu", "belady"):
        simulation = simulate(trace, 3, policy, steps=True)
        timing = predict(simulation, machine, work)
        total = timing.pass_s.sum()
        assert total >= timing.transferred_bytes / machine.link_bytes_per_s
        read = simulation.steps.experts.sum() * 100 + len(timing.pass_s) * 400
        assert total >= read / machine.device_bytes_per_s
        wait = simulation.steps.loads.sum() * 0.011
        assert timing.link_s.sum() == pytest.approx(wait)


@pytest.mark.parametrize(
    "figures",
    [
        {"link_bytes_per_s": 0},
        {"link_bytes_per_s": float("nan")},
        {"link_bytes_per_s": 1e9, "link_latency_s": -1},
        {"link_bytes_per_s": 1e9, "device_bytes_per_s": float("inf")},
    ],
)
def test_impossible_machines_are_refused(figures):
    """Zero, negative, infinite or no number: a sentence that names the figure."""
    with pytest.raises(HardwareError, match="cannot be"):
        Machine(**figures)


def test_what_is_not_known_is_asked_for():
    """No way to compute, host misses without a host, experts of no size, steps not kept."""
    link = Machine(link_bytes_per_s=1e9)
    with pytest.raises(HardwareError, match="how fast the model computes"):
        predict(run([[0]], [[1]]), link, WORK)
    with pytest.raises(HardwareError, match="host memory"):
        loads_when("cpu", link, WORK)
    with pytest.raises(HardwareError, match="host"):
        predict(run([[0]], [[1]], on_host=[[1]]), Machine(**SLOW), WORK)
    with pytest.raises(HardwareError, match="expert_bytes"):
        Work(expert_bytes=0)
    with pytest.raises(ValueError, match="steps=True"):
        predict(simulate(random_trace(0), 3), Machine(**SLOW), WORK)
    with pytest.raises(ValueError, match="miss must be"):
        loads_when("hope", link, WORK)


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
    The one load's copy, 3 ms, is made by the same thread.
    """
    machine = Machine(**SLOW, dram_bytes_per_s=2e4, host_row_s=1e-3, copy_s=3e-3)
    work = Work(expert_bytes=100, activation_bytes=50, backbone_bytes=300, kv_bytes=100)
    assert computed_s(machine, work, 2, 5, 3) == pytest.approx(0.010 + 0.003 + 0.040 + 0.002)
    done = run([[1]], [[4]], on_host=[[2]], tokens=[3])
    done.steps.on_host_uses[:] = 5
    assert predict(done, machine, work).host_s == pytest.approx([0.055 + 0.003])


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
        found[miss] = simulate(trace, 3, prefetch=Listed(wanted), load=load, steps=True)
    assert found["cpu"].counters.loads.sum() == 0 < found["split"].counters.loads.sum()
    steps = found["split"].steps
    assert (steps.loads + steps.on_host <= steps.experts).all() and steps.on_host.any()
    assert not found["wait"].steps.on_host.any()


def test_a_prefetch_is_waited_for_before_its_pass():
    """Two prefetches of 11 ms, then two layers of 2 + 4 ms; copies of 15 ms last longer."""
    timing = predict(run([[0, 0]], [[4, 4]], ahead=[[1, 1]]), Machine(**SLOW), WORK)
    assert timing.pass_s == pytest.approx([0.022 + 0.012])
    assert (timing.ahead_s, timing.link_s) == (pytest.approx([0.022]), pytest.approx([0.0]))
    assert timing.transferred_bytes == 200
    slower = predict(run([[0, 0]], [[4, 4]], ahead=[[1, 1]]), Machine(**SLOW, copy_s=0.015), WORK)
    assert slower.ahead_s == pytest.approx([0.030])
