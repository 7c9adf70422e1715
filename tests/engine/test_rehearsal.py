"""Going through the motions of misses costs time and changes nothing else."""

import time

import pytest
import torch
from test_attach import PROMPT, block_floats, generate

from melinoe import attach
from melinoe.cache.timing import Machine
from melinoe.engine.misses import HostExperts
from melinoe.engine.rehearsal import (
    HOST_ALL,
    HOST_MOST,
    HOST_ONE,
    LOADS,
    MOTIONS,
    ONE_PART,
    PARTS,
    PLAIN,
    Rehearsal,
    Wait,
    figures_from,
    over,
    time_calls,
)
from melinoe.engine.transfer import EmulatedLink


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_changes_no_bit_and_leaves_the_runtime_as_it_was(model, motion):
    """The same tokens meanwhile, and afterwards every attribute, and every expert's weights."""
    expected = generate(model, "greedy")
    with torch.no_grad():
        logits = model(PROMPT).logits
    with attach(model, slots=8, link=EmulatedLink(1e9)) as handle:
        rehearsal = Rehearsal(handle)
        before = [dict(vars(cache)) for cache in handle._caches]
        with rehearsal.doing(motion):
            begin = time.perf_counter()
            assert torch.equal(generate(model, "greedy"), expected)
            took_s = time.perf_counter() - begin
        assert [dict(vars(cache)) for cache in handle._caches] == before
        assert handle.link is handle.engine.transfer._link
        if isinstance(motion, Wait):  # decoding passes x layers, x experts of a token
            assert took_s > 7 * 2 * motion.seconds * (2 if motion.in_parts else 1)
        handle.reset_counters()
        with torch.no_grad():
            assert torch.equal(model(PROMPT).logits, logits)
        assert handle.counters.loads.sum() == 0


def test_each_motion_does_what_its_name_says(model, monkeypatch):
    """Of 2 experts a token and layer: loads of a quarter's cache; one, or both, on the host."""
    computed = []
    compute = HostExperts.compute
    monkeypatch.setattr(
        HostExperts, "compute", lambda *a: computed.append(len(a[3])) or compute(*a)
    )
    with attach(model, slots=8) as handle:
        rehearsal = Rehearsal(handle)
        found = {}
        for motion in (PLAIN, ONE_PART, PARTS, LOADS, HOST_ONE, HOST_MOST, HOST_ALL):
            handle.reset_counters()
            computed.clear()
            with rehearsal.doing(motion):
                generate(model, "greedy")
            counted = handle.counters
            found[motion] = (
                int(counted.loads[1].sum()) > 0,
                int(counted.chunked[1].sum()),
                int(counted.on_host[1].sum()),
                set(computed),
            )
            assert counted.loads[0].sum() == counted.on_host[0].sum() == 0  # prompts as always
    assert found == {
        PLAIN: (False, 0, 0, set()),
        ONE_PART: (False, 0, 0, set()),
        PARTS: (False, 7 * 2, 0, set()),  # passes x layers
        LOADS: (True, 0, 0, set()),
        HOST_ONE: (False, 0, 7 * 2, {1}),
        HOST_MOST: (False, 0, 7 * 2, {1}),  # of two
        HOST_ALL: (False, 0, 7 * 2 * 2, {2}),
    }


@pytest.mark.parametrize("chosen", [2, 4])
def test_figures_are_taken_apart_as_they_were_put_together(model, chosen, monkeypatch):
    """
    Two layers, a pass of 10 ms. By layer: parts 0.4 ms, 0.3 each further; the host 0.1 and 0.5 an
    expert; a call on slots 0.2 and 0.05 an expert; a load 0.1; a wait of 1 ms 0.25, in parts 0.1.

    With two experts a token, one of them is all but one, so what the host takes once is in each.
    """
    import melinoe.engine.rehearsal as module

    parts, part, once, host, call, each = 0.4e-3, 0.3e-3, 0.1e-3, 0.5e-3, 0.2e-3, 0.05e-3
    if chosen == 2:
        once = 0.0
    monkeypatch.setattr(module, "_chosen", lambda handle: chosen)

    def on_the_host(count):
        called = call if count == chosen else 0.0
        return 0.010 + 2 * (parts + once + count * (host - each) - called)

    seconds = {
        PLAIN: 0.010,
        ONE_PART: 0.010 + 2 * parts,
        PARTS: 0.010 + 2 * (parts + (chosen - 1) * part),
        LOADS: 0.010 + 3 * 0.1e-3,
        HOST_ONE: on_the_host(1),
        HOST_MOST: on_the_host(chosen - 1),
        HOST_ALL: on_the_host(chosen),
        Wait(0.001): 0.010 + 2 * (0.001 + 0.25e-3),
        Wait(0.002): 0.010 + 2 * (0.002 + 0.5e-3),
        Wait(0.003): 0.010 + 2 * (0.003 + 0.3e-3),  # less than after 2 ms: both are .4
    }
    for wait_s, more in ((0.001, 0.1e-3), (0.003, 0.2e-3)):
        seconds[Wait(wait_s, in_parts=True)] = seconds[PARTS] + 2 * chosen * (wait_s + more)
    with attach(model, slots=8, link=EmulatedLink(1e6, 1e-3)) as handle:
        found = figures_from(seconds, handle, 3, (call + each, call + chosen * each))
        assert over(found, handle).link_bytes_per_s == 1e6
        assert min(time_calls(handle, repeats=3)) > 0
    size = 4 * block_floats(model)
    assert isinstance(found, Machine) and found.pass_s == 0.010
    assert size / found.dram_bytes_per_s == pytest.approx(host)
    assert found.host_call_s == pytest.approx(once, abs=1e-12)
    assert (found.parts_s, found.part_s) == (pytest.approx(parts), pytest.approx(part))
    assert found.copy_s == pytest.approx(0.1e-3)
    assert found.call_s == pytest.approx(call)
    assert found.experts_share == pytest.approx(2 * (call + chosen * each) / 0.010)
    waits, more = zip(*found.after_wait_s, strict=True)
    assert waits == (0.001, 0.002, 0.003)
    assert more == pytest.approx((0.25e-3, 0.4e-3, 0.4e-3))
    waits, more = zip(*found.part_after_wait_s, strict=True)
    assert waits == (0.001, 0.003)
    assert more == pytest.approx((0.1e-3, 0.2e-3))
