"""A streamed prompt copies each missing expert once and evicts nothing that the pass uses."""

import numpy as np
import pytest
from cache_traces import random_trace

from melinoe.cache.residency import Load, Residency, Stream, StreamedPrefill
from melinoe.cache.simulator import simulate


def resident(policy="lru", experts=(0, 1, 2)):
    residency = Residency(8, 4, policy)
    for expert in experts:
        residency.request([expert])
    return residency


def test_the_most_used_are_admitted_free_slots_first():
    """Worked by hand: one free slot, then residents the pass does not use, the oldest first."""
    residency = resident()
    stream = StreamedPrefill().serve(residency, [1, 3, 4, 5, 6, 7], [2, 1, 5, 5, 9, 1])
    # 6 takes the free slot 3; 4 and 5 (equal, so 4 first) those of 0 and 2; 3 and 7 pass.
    assert stream == Stream((1,), (Load(6, 3, None), Load(4, 0, 0), Load(5, 2, 2)), (3, 7))
    assert stream.loads == 5
    residency.check_invariants()
    # The most used are the most recent: of 1, 4, 5, 6 the next to leave is 1, used twice.
    assert residency.request([0]).loads == (Load(0, 1, 1),)


def test_a_limit_keeps_what_others_decode_with():
    """admit=0 only fills free slots, admit=1 replaces one resident."""
    keep, one = resident(), resident()
    uses = ([4, 5, 6], [3, 2, 1])
    assert StreamedPrefill(0).serve(keep, *uses) == Stream((), (Load(4, 3, None),), (5, 6))
    assert sorted(keep.expert_of) == [0, 1, 2, 4]
    assert StreamedPrefill(1).serve(one, *uses).admitted == (Load(4, 3, None), Load(5, 0, 0))
    with pytest.raises(ValueError, match="0 or more"):
        StreamedPrefill(-1)


def test_a_prompt_of_nobody_is_no_request():
    """The policy does not hear of it."""
    residency = resident("lfu")
    before = residency.policy.scores()
    assert StreamedPrefill().serve(residency, [], []) == Stream((), (), ())
    assert residency.policy.scores() == before


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("admit", [None, 0, 1, 3])
def test_invariants_hold_on_random_requests(seed, admit):
    """Each missing expert once, none of the pass's own evicted, at most admit others evicted."""
    rng = np.random.default_rng(seed)
    residency = Residency(12, 5, ("lru", "lfu")[seed % 2])
    for _ in range(20):
        before = {int(e) for e in residency.expert_of if e >= 0}
        experts = sorted(rng.permutation(12)[: rng.integers(1, 13)].tolist())
        uses = rng.integers(1, 4, len(experts)).tolist()
        stream = StreamedPrefill(admit).serve(residency, experts, uses)
        residency.check_invariants()
        copied = [load.expert for load in stream.admitted] + list(stream.passing)
        assert sorted([*copied, *stream.hits]) == experts
        assert set(stream.hits) == before & set(experts)
        evicted = [load.evicted for load in stream.admitted if load.evicted is not None]
        assert not set(evicted) & set(experts) and set(evicted) <= before
        assert len(evicted) <= (12 if admit is None else admit)
        of = dict(zip(experts, uses, strict=True))
        keys = [(-of[expert], expert) for expert in copied]
        assert keys == sorted(keys)
        if stream.passing and admit is None:  # nothing could have been admitted instead
            assert {int(e) for e in residency.expert_of} <= set(experts)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_simulator_streams_prompts_only(policy):
    """Uses and tokens as without; prompts never load an expert twice; decoding is as planned."""
    trace = random_trace(3)
    plain = simulate(trace, 3, policy).counters
    rule = StreamedPrefill()
    streamed = simulate(trace, 3, policy, prefill=rule).counters
    assert np.array_equal(streamed.uses, plain.uses)
    assert np.array_equal(streamed.tokens, plain.tokens)
    assert not streamed.chunked[0].any()

    residencies = [Residency(trace.num_experts, 3, policy) for _ in range(trace.num_layers)]
    loads = np.zeros((2, trace.num_layers), dtype=int)
    for forward in trace.passes():
        for layer, (experts, uses) in enumerate(forward.requests):
            if forward.phase == 0:
                loads[0, layer] += rule.serve(residencies[layer], experts, uses).loads
            else:
                for decision in residencies[layer].request_in_parts(experts, uses):
                    loads[1, layer] += len(decision.loads)
    assert np.array_equal(streamed.loads, loads)


def test_streaming_is_refused_where_it_is_not_defined():
    """By the compiled rules."""
    with pytest.raises(ValueError, match="loading all"):
        simulate(random_trace(0), 3, "lru", prefill=StreamedPrefill(), engine="compiled")
