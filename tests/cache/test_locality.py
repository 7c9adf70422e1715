"""Locality measures on traces small enough to count by eye."""

import numpy as np
import pytest
from cache_traces import random_trace, trace_of

from melinoe.cache.locality import distinct_experts, experts_per_sequence, reuse, sch, srp
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from melinoe.errors import MelinoeError


def two_sequences():
    """
    Two layers, top-2, six experts.

    Sequence 0: prompt (0,1), completion (1,2) (2,1) in layer 0; (0,1), (4,5) (0,4) in layer 1.
    Sequence 1: prompt (3,4), no completion but a padding row (5,5).
    """
    builder = TraceBuilder(2, 6, 2)
    builder.add_forward(np.array([[[0, 1], [0, 1]]]), 0, 0)
    builder.add_forward(np.array([[[1, 2], [4, 5]], [[3, 4], [3, 4]]]), [0, 1], [1, 0])
    builder.add_forward(np.array([[[2, 1], [0, 4]], [[5, 5], [5, 5]]]), [0, 1], [1, 2])
    return builder.trace()


def test_experts_per_sequence_is_the_mean_over_layers_of_distinct_completion_experts():
    """Layer 0 used {1,2}, layer 1 {0,4,5}: 2.5; no completion, no number."""
    result = experts_per_sequence(two_sequences())
    assert result[0] == 2.5
    assert np.isnan(result[1])


def test_reuse_compares_with_the_previous_token_of_the_sequence():
    """Layer 0: 1 of 2 (the prompt's last token), then 2 of 2; layer 1: 0, then 1: 4 of 8."""
    result = reuse(two_sequences())
    assert result[0] == 0.5
    assert np.isnan(result[1])


def test_absent_experts_are_never_reused():
    """(-1,0) then (-1,0): one choice, reused; not two."""
    trace = trace_of([[-1, 0]], [[-1, 0]], [[-1, -1]], num_experts=2, top_k=2)
    assert reuse(trace).tolist() == [1.0]
    assert experts_per_sequence(trace).tolist() == [1.0]


def test_distinct_experts_counts_the_whole_set():
    """Completion tokens alone: {1,2} in layer 0, {0,4,5} in layer 1."""
    assert distinct_experts(two_sequences()).tolist() == [2, 3]


def test_an_empty_trace_has_no_locality():
    """No rows: no sequences, no experts."""
    trace = TraceBuilder(2, 4, 1).trace()
    assert experts_per_sequence(trace).shape == reuse(trace).shape == (0,)
    assert distinct_experts(trace).tolist() == [0, 0]


def decode(*tokens, num_experts=4, top_k=1):
    """One layer, one sequence of completion tokens."""
    return trace_of(*[[token] for token in tokens], num_experts=num_experts, top_k=top_k)


def test_srp_worked_by_hand():
    """
    Tokens 0 0 1 0, m = 2: segments {0:2} {0:1,1:1} {0:1,1:1}, six uses in three segments.

    Threshold 2 takes one pair of 2 tokens, both used: F1 = 2*2 / (2 + 6) = .5. Threshold 1 takes
    five pairs of 2 tokens, 6 of them used: 2*6 / (10 + 6) = .75. Threshold 0 takes all twelve
    pairs of 2 tokens: 12 / 30.
    """
    assert srp(decode([0], [0], [1], [0]), 2) == 0.75


def test_srp_of_segments_that_use_the_same_experts_is_one():
    """Always experts 1 and 3: any m, F1 1; so it is for m = 1 whatever the tokens do."""
    trace = decode(*[[1, 3]] * 6, top_k=2)
    assert [srp(trace, m) for m in (1, 2, 5)] == [1.0] * 3
    assert srp(random_trace(0), 1) == 1.0


def test_srp_of_each_layer_has_its_own_threshold():
    """Layer 0 as worked above, layer 1 constant: .75 and 1; together one threshold for both."""
    builder = TraceBuilder(2, 4, 1)
    for token in (0, 0, 1, 0):
        builder.add_forward([[[token], [2]]], 0, 1)
    trace = builder.trace()
    assert srp(trace, 2, by_layer=True).tolist() == [0.75, 1.0]
    # Threshold 1: matches 6 + 6, taken 10 + 6, used 12; threshold 2: 2 + 6, 2 + 6, 12.
    assert srp(trace, 2) == pytest.approx(max(2 * 12 / (16 + 12), 2 * 8 / (8 + 12)))


def test_srp_has_no_segment_across_sequences():
    """Two sequences of two tokens have no segment of three."""
    builder = TraceBuilder(1, 4, 1)
    for sequence in (0, 1):
        for _ in range(2):
            builder.add_forward([[[sequence]]], sequence, 1)
    assert srp(builder.trace(), 2) == 1.0
    with pytest.raises(MelinoeError, match="3 completion tokens"):
        srp(builder.trace(), 3)


def srp_by_definition(trace, m):
    """Try every threshold, count every pair one by one."""
    best = 0.0
    for threshold in range(m + 1):
        taken = matched = used = 0
        for sequence in range(trace.num_sequences):
            rows = trace.completion(sequence)
            for start in range(len(rows) - m + 1):
                for layer in range(trace.num_layers):
                    segment = [set(t.tolist()) - {-1} for t in rows[start : start + m, layer]]
                    for expert in range(trace.num_experts):
                        count = sum(expert in token for token in segment)
                        used += count
                        if count >= threshold:
                            taken += m
                            matched += count
        best = max(best, 2 * matched / (taken + used))
    return best


@pytest.mark.parametrize("m", [1, 2, 4, 7])
def test_srp_equals_its_definition(m):
    """Two layers, three sequences, absent experts."""
    for seed in range(3):
        trace = random_trace(seed)
        assert srp(trace, m) == pytest.approx(srp_by_definition(trace, m))


def test_sch_worked_by_hand():
    """
    Top-1, rho 2, so two slots; tokens 0 1 2 0 1.

    m = 1: at 2 the next token is 0, so 1 leaves: hits 0, then 1 misses: 1 of 5. m = 0 is LRU: 0
    leaves at 2, 1 at 0, 2 at 1: no hit. m = 2: at 2 both 0 and 1 come, once each, so the older, 0,
    leaves; at 0 (1 is next) 2 leaves; 1 hits: 1 of 5.
    """
    trace = decode([0], [1], [2], [0], [1])
    assert [sch(trace, m, 2) for m in (0, 1, 2)] == [0.0, 0.2, 0.2]


def test_sch_sees_how_often_not_how_soon():
    """Tokens 0 1 2 0 1 1: with m = 3 expert 1 is used twice of {0,1,1}, so 0 leaves for 2."""
    trace = decode([0], [1], [2], [0], [1], [1])
    # 0 1 2(-0) 0(-2) 1 hit 1 hit; Belady would keep 0 and pay for 1 instead, the same here.
    assert sch(trace, 3, 2) == pytest.approx(2 / 6)


def test_more_foresight_can_be_worse():
    """
    Tokens 0 1 2 0 2 1 1 1 in two slots: when 2 comes, 0 is used next, and 1 more often but later.

    m = 1 keeps 0, and misses 1 once: four hits. m = 5 keeps 1, and misses 0 and 2: three.
    """
    trace = decode([0], [1], [2], [0], [2], [1], [1], [1])
    assert [sch(trace, m, 2) for m in (1, 5)] == [4 / 8, 3 / 8]


@pytest.mark.parametrize("seed", range(5))
def test_sch_lies_between_lru_and_belady(seed):
    """Cold per sequence, decoding alone: m = 0 is LRU's hit rate, and Belady bounds every m."""
    whole = random_trace(seed, prompt=1)
    rows = whole.kind == 1
    trace = type(whole)(
        whole.experts[rows],
        np.unique(whole.forward[rows], return_inverse=True)[1].astype(np.int32),
        whole.sequence[rows],
        whole.kind[rows],
        whole.num_experts,
    )
    slots = 2 * trace.top_k
    bound = simulate(trace, slots, "belady", reset_between_sequences=True).counters.hit_rate()
    rates = [sch(trace, m, 2) for m in (0, 1, 4, 12)]
    assert all(rate <= bound + 1e-12 for rate in rates)
    assert sch(trace, 4, 2, by_layer=True).shape == (2,)
    # Ties apart (ours are by id, LRU's by the order of service) nothing else differs.
    lru = simulate(trace, slots, "lru", reset_between_sequences=True).counters.hit_rate()
    assert rates[0] == pytest.approx(lru, abs=0.02)


def test_impossible_segments_are_refused():
    """No token, no slot for a token's experts, more slots than experts, no completion."""
    trace = random_trace(0)
    with pytest.raises(ValueError, match="at least one token"):
        srp(trace, 0)
    with pytest.raises(ValueError, match="rho"):
        sch(trace, 4, 0.5)
    with pytest.raises(MelinoeError, match="at most 8"):
        sch(trace, 4, 5)
    with pytest.raises(MelinoeError, match="no completion"):
        sch(trace_of([[0]], num_experts=2, top_k=1, kind=0), 1, 1)
