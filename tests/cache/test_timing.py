"""The time model's formulas, each worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from cache_traces import random_trace
from timed_steps import SLOW, WORK, run

from melinoe.cache.simulator import simulate
from melinoe.cache.timing import Machine, Work, loads_when, predict
from melinoe.errors import HardwareError


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


def test_parts_are_paid_by_their_number():
    """
    Two slots. 5 experts: 3 parts, 4 + 2 x 3 ms. 2 experts: none. On the host: the 4 ms alone.

    With nothing in slots the layer's 1 ms for calling the device is not paid.
    """
    machine = Machine(
        link_bytes_per_s=1e12, dram_bytes_per_s=1e12, pass_s=0.010, experts_share=0.2,
        call_s=0.001, parts_s=0.004, part_s=0.003,
    )  # fmt: skip
    done = run([[0], [0], [0], [0]], [[5], [2], [2], [2]], on_host=[[0], [0], [1], [2]])
    done = replace(done, slots=(2,))
    expected = [0.010 + 0.010, 0.010, 0.014 - 0.0005, 0.014 - 0.002]
    assert predict(done, machine, WORK).pass_s == pytest.approx(expected)


def test_what_follows_a_wait_is_slower_by_how_long_it_was():
    """
    After 10 ms 2 more, after 20 and longer 3 more; layers wait 11, 0 and 22 ms.

    Of 11 ms the copy took 4: 7 of idleness, 1.4 more. Of 22 the copies took 8: 14, and 2.4 more.
    """
    curve = ((0.010, 0.002), (0.020, 0.003))
    plain, cold = Machine(**SLOW, copy_s=0.004), Machine(**SLOW, copy_s=0.004, after_wait_s=curve)
    assert [cold.colder_s(1e-3 * ms) for ms in (0, 5, 10, 15, 99)] == pytest.approx(
        [0, 0.001, 0.002, 0.0025, 0.003]
    )
    done = replace(run([[1, 0, 2]], [[4, 4, 4]]), slots=(4, 4, 4))
    before, after = predict(done, plain, WORK), predict(done, cold, WORK)
    assert after.pass_s - before.pass_s == pytest.approx([0.0014 + 0.0024])
    assert (after.link_s == before.link_s).all()


def test_each_part_waits_for_itself():
    """Four experts through one slot: 4 waits of 7 ms, 1.4 more each; two through two: one of 14."""
    machine = Machine(**SLOW, copy_s=0.004, after_wait_s=((0.010, 0.002), (0.020, 0.003)))
    plain = Machine(**SLOW, copy_s=0.004)
    four = run([[4]], [[4]])
    two = replace(run([[2]], [[2]]), slots=(2,))
    for done, more in ((four, 4 * 0.0014), (two, 0.0024)):
        difference = predict(done, machine, WORK).pass_s - predict(done, plain, WORK).pass_s
        assert difference == pytest.approx([more])
    machine = replace(machine, part_after_wait_s=((0.010, 0.001),))  # 0.7 after 7, only in parts
    for done, more in ((four, 4 * 0.0007), (two, 0.0024)):
        difference = predict(done, machine, WORK).pass_s - predict(done, plain, WORK).pass_s
        assert difference == pytest.approx([more])


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
        {"link_bytes_per_s": 1e9, "experts_share": 1.5},
        {"link_bytes_per_s": 1e9, "after_wait_s": ((2.0, 0.1), (1.0, 0.2))},
        {"link_bytes_per_s": 1e9, "part_after_wait_s": ((1.0, -0.1),)},
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
