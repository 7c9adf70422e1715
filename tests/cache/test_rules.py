"""The rules beyond LRU, LFU and Belady, each worked by hand."""

import pytest
from cache_traces import random_trace, trace_of

from melinoe.cache.policy import LFRU, Belady, DecayedLFU, Score, Static, policy_makers
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from melinoe.errors import MelinoeError, TraceError


def test_lfru_divides_uses_by_the_age_of_the_last():
    """{0} {0} {0} {1} {2}: when 2 comes, 0 has 3/3 and 1 has 1/2, so 1 leaves; LRU would take 0."""
    lfru = LFRU()
    residency = Residency(3, 2, lfru)
    for experts in ([0], [0], [0], [1]):
        residency.request(experts)
    (load,) = residency.request([2]).loads
    assert load.evicted == 1
    assert [lfru.rank(e) for e in range(3)] == [3 / 3, 1 / 2, 1 / 1]


def test_lfru_lets_an_old_favourite_go_in_the_end():
    """0 three times, then nothing for six requests: 3/7 against 1/2 of the newcomer's last use."""
    residency = Residency(3, 2, LFRU())
    for experts in ([0], [0], [0], [1], [1], [1], [1], [1]):
        residency.request(experts)
    (load,) = residency.request([2]).loads
    # Clock 9: 0 has 3 / (9 - 3 + 1), 1 has 5 / (9 - 8 + 1).
    assert load.evicted == 0


def test_score_averages_the_router_s_weights():
    """Alpha .5: S(0) = .5*.9 then .225; S(1) = .5*.1*.5 + .5*.2: .225 stays, .125 leaves."""
    score = Score()
    residency = Residency(3, 2, score)
    residency.request([0, 1], None, [0.9, 0.1])
    residency.request([1], None, [0.2])
    assert [score.gamma, *(s * 0.5 for s in score.scores())] == pytest.approx(
        [0.5, 0.225, 0.125, 0]
    )
    (load,) = residency.request([2], None, [0.01]).loads
    assert load.evicted == 1


def test_score_keeps_only_the_best_of_each_pass():
    """Top 1 of weights .4 and .6: the other expert's score stays zero."""
    score = Score(top=1)
    score.reset(2)
    score.weigh([0, 1], [0.4, 0.6])
    score.use([0, 1])
    assert score.scores() == [0.0, 0.6]


def test_score_with_equal_weights_is_lfu_with_the_other_decay():
    """Weights all 1/2 in float16: the same loads as lfu with gamma .5, request by request."""
    trace = random_trace(3, completion=40)
    builder = TraceBuilder(trace.num_layers, trace.num_experts, trace.top_k)
    for number in range(trace.num_forwards):
        rows = trace.forward == number
        builder.add_forward(trace.experts[rows], trace.sequence[rows], trace.kind[rows], 0.5)
    weighed = builder.trace()
    decode = weighed.kind == 1  # in a prompt's pass the mean weighs experts by their uses
    assert decode.any()
    only = TraceBuilder(trace.num_layers, trace.num_experts, trace.top_k)
    for row in range(int(decode.sum())):
        only.add_forward(weighed.experts[decode][row : row + 1], 0, 1, 0.5)
    scores = simulate(only.trace(), 3, "score")
    counts = simulate(only.trace(), 3, "lfu", policy_options={"gamma": 0.5})
    assert scores.counters == counts.counters


def test_score_is_refused_without_weights():
    """A trace of choices alone cannot drive it; the message names the rule that can."""
    with pytest.raises(TraceError, match="lfu with gamma"):
        simulate(random_trace(0), 3, "score")
    with pytest.raises(MelinoeError, match="router's weights"):
        Residency(3, 2, "score").request([0])


def test_static_gives_up_the_unpopular_however_recent():
    """Popularity 5, 1, 3: after {0} {2} {1}, 1 took the slot of 2, and is itself next to go."""
    residency = Residency(3, 2, Static([5, 1, 3]))
    evicted = [load.evicted for e in (0, 2, 1, 2) for load in residency.request([e]).loads]
    assert evicted == [None, None, 2, 1]


def test_static_counts_popularity_in_the_trace_unless_told():
    """0 twice and 1 once here; told the opposite, the other one stays."""
    trace = trace_of([[0]], [[1]], [[0]], [[2]], [[0]], num_experts=3, top_k=1)
    assert simulate(trace, 2, "static").counters.loads.sum() == 3
    told = simulate(trace, 2, "static", policy_options={"popularity": [[0, 9, 5]]})
    assert told.counters.loads.sum() == 4


def test_static_wants_a_popularity_for_every_layer_and_expert():
    """One row for two layers, or two numbers for eight experts: refused."""
    trace = random_trace(0)
    with pytest.raises(MelinoeError, match="all 2 layers"):
        simulate(trace, 3, "static", policy_options={"popularity": [[1] * 8]})
    for engine in ("residency", "compiled"):
        with pytest.raises(ValueError, match="2 experts of 8"):
            simulate(trace, 3, "static", policy_options={"popularity": [[1, 2]] * 2}, engine=engine)


def test_options_of_a_policy_reach_it():
    """Made by name for a layer, options and all; unknown ones are a caller's mistake."""
    (make,) = policy_makers("lfu", {"gamma": 0.5}, 1)
    made = make()
    assert isinstance(made, DecayedLFU) and made.gamma == 0.5
    (make,) = policy_makers("belady", {"future": [[[0]]]}, 1)
    assert isinstance(make(), Belady)
    with pytest.raises(TypeError):
        policy_makers("lru", {"gamma": 0.5}, 1)[0]()
    with pytest.raises(ValueError, match="alpha"):
        Score(alpha=1.0)
