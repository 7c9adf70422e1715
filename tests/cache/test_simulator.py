"""The simulator against an independent replay, by hand, and piece by piece."""

import numpy as np
import pytest
from cache_reference import replay
from cache_traces import random_trace, trace_of
from trace_builder import TraceBuilder

from melinoe.cache.counters import Counters
from melinoe.cache.policy import LRU, DecayedLFU
from melinoe.cache.prefetch import Listed
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.errors import CacheTooSmallError, MelinoeError

RULES = ["lru", "lfu", "static", "belady"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_counts_equal_an_independent_replay(rule, batch, slots):
    """Prompts, batches, padding, absent experts, too few slots: all counts."""
    for seed in range(3):
        trace = random_trace(seed, sequences=4, batch=batch)
        tallies, tokens, zero_miss = replay(trace, slots, rule)
        counters = simulate(trace, slots, rule).counters
        for (phase, layer), tally in tallies.items():
            for name, value in vars(tally).items():
                assert getattr(counters, name)[phase, layer] == value, (name, phase, layer)
        assert counters.tokens.tolist() == tokens
        assert counters.zero_miss_tokens.tolist() == zero_miss


def test_lru_counts_worked_by_hand():
    """Two slots, {0,1} {0,2} {1,2} {1,2}: misses 2, 1, 1, 0 of 8 uses; the last token waits not."""
    trace = trace_of([[0, 1]], [[0, 2]], [[1, 2]], [[1, 2]], num_experts=4, top_k=2)
    counters = simulate(trace, 2).counters
    assert counters.loads.tolist() == [[0], [4]]
    assert counters.hits.tolist() == [[0], [4]]
    assert counters.hit_rate() == 0.5
    assert counters.transfers_per_token() == 1.0
    assert counters.zero_miss_share() == 0.25
    assert counters.chunked.sum() == 0


def test_a_request_in_parts_is_a_hit_only_where_it_began_resident():
    """Two slots hold {0,1}; a pass of rows (0,2) (0,3) (2,3) has 2 hits of 6 uses and 2 loads."""
    trace = trace_of([[0, 1]], [[0, 2], [0, 3], [2, 3]], num_experts=4, top_k=2)
    counters = simulate(trace, 2).counters
    assert counters.uses[1, 0] == 2 + 6
    assert counters.hits[1, 0] == 2
    assert counters.loads[1, 0] == 2 + 2
    assert counters.chunked[1, 0] == 1
    assert counters.requests[1, 0] == 2


def test_a_pass_is_of_the_prompt_if_any_row_is():
    """Rows of kinds completion and prompt in one pass: both tokens count as prompt."""
    trace = trace_of([[0], [1]], num_experts=2, top_k=1, kind=np.array([1, 0]))
    assert simulate(trace, 2).counters.tokens.tolist() == [2, 0]


def test_a_pass_of_padding_alone_is_of_the_prompt():
    """The first piece of a left-padded prompt may be all padding: three rows, all the prompt's."""
    builder = TraceBuilder(1, 2, 1)
    builder.add_forward(np.array([[[0]], [[0]]]), 0, 2)
    builder.add_forward(np.array([[[1]]]), 0, 0)
    assert simulate(builder.trace(), 2).counters.tokens.tolist() == [3, 0]


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_a_layer_that_chose_no_expert_made_no_request(policy):
    """Twenty empty passes between {0} {0} {1} and {2} {0}: they neither count nor age anybody.

    With them as requests, decayed LFU at gamma 0.1 would hold 1 dearer than 0 all the same, so the
    policy's scores are compared: after {0} {0} {1} {2} they are 0.011, 0.1, 1 in units of a use.
    """
    rows = [[[0]], [[0]], [[1]], *[[[-1]]] * 20, [[2]]]
    trace = trace_of(*rows, num_experts=3, top_k=1)
    made = []

    def make():
        made.append(DecayedLFU(0.1))
        return made[-1]

    counters = simulate(trace, 2, make if policy == "lfu" else policy).counters
    assert counters.requests.tolist() == [[0], [4]]
    assert counters.forwards.tolist() == [0, 24]
    assert counters.loads.tolist() == [[0], [3]]
    if policy == "lfu":
        assert made[-1].scores() == pytest.approx([0.011, 0.1, 1.0])


@pytest.mark.parametrize("policy", ["lru", "lfu", "belady"])
def test_units_add_up_to_the_whole(policy):
    """Counters per sequence sum to the counters of the trace, prefetches too."""
    trace = random_trace(7)
    wanted = {0: [[0, 1], [2, 3]], 2: [[4], []]}
    simulation = simulate(trace, 3, policy, prefetch=Listed(wanted))
    total = Counters(trace.num_layers)
    for counters in simulation.per_sequence:
        total = total.plus(counters)
    assert simulation.sequences == [(0,), (1,), (2,)]
    assert total == simulation.counters
    assert simulation.counters.prefetch_loads.sum() > 0


def test_sequences_that_share_a_pass_are_one_unit():
    """Five sequences in batches of two make the units {0,1} {2,3} {4}."""
    trace = random_trace(0, sequences=5, batch=2)
    assert simulate(trace, 3).sequences == [(0, 1), (2, 3), (4,)]


def test_reset_makes_sequences_independent():
    """With resets, each unit costs what it costs alone; without, the first one does."""
    trace = random_trace(1)
    with_reset = simulate(trace, 4, reset_between_sequences=True)
    for sequence, counters in enumerate(with_reset.per_sequence):
        assert counters == simulate(trace.select([sequence]), 4).counters
    without = simulate(trace, 4)
    assert without.per_sequence[0] == with_reset.per_sequence[0]
    assert without.counters != with_reset.counters


def test_belady_with_resets_costs_no_more_than_alone():
    """Emptying the cache between sequences leaves Belady's bound for each sequence intact."""
    trace = random_trace(5)
    with_reset = simulate(trace, 4, "belady", reset_between_sequences=True)
    for sequence, counters in enumerate(with_reset.per_sequence):
        alone = simulate(trace.select([sequence]), 4, "belady").counters
        assert counters == alone


def test_a_prefetch_at_the_completion_comes_after_the_prompt_has_evicted():
    """Two slots, prompt {0,1,2}, completion {0,1}: 0 is brought back, and nothing is missed."""
    builder = TraceBuilder(1, 4, 2)
    builder.add_forward(np.array([[[0, 1]], [[1, 2]]]), 0, 0)
    builder.add_forward(np.array([[[0, 1]]]), 0, 1)
    trace = builder.trace()
    wanted = {0: [[0, 1]]}
    late = simulate(trace, 2, prefetch=Listed(wanted)).counters
    # The prompt: 0 and 2 come first and 1, used twice, last, over 0.
    assert late.loads.tolist() == [[3], [0]] and late.prefetch_loads.tolist() == [1]


def test_a_prefetch_comes_before_the_first_pass_and_is_charged_apart():
    """{0,1} prefetched, then {0,1}: two hits, no demand load, adjusted hit rate 0."""
    trace = trace_of([[0, 1]], num_experts=4, top_k=2)
    counters = simulate(trace, 2, prefetch=Listed({0: [[0, 1]]})).counters
    assert counters.hit_rate() == 1.0
    assert counters.adjusted_hit_rate() == 0.0
    assert counters.prefetch_per_token() == 2.0
    assert counters.transfers_per_token() == 0.0
    assert counters.zero_miss_share() == 1.0


def test_the_residency_is_called_as_a_runtime_would(monkeypatch):
    """One request per pass and layer, layers in order, ids ascending, with their uses."""
    calls = []
    decisions = Residency.request_in_parts
    monkeypatch.setattr(
        Residency,
        "request_in_parts",
        lambda self, experts, uses: (
            calls.append((self, experts, uses)) or decisions(self, experts, uses)
        ),
    )
    trace = random_trace(3, sequences=1, layers=3, completion=2)
    simulate(trace, 3)
    layer_of = {residency: n for n, residency in enumerate(dict.fromkeys(c[0] for c in calls))}
    assert [layer_of[c[0]] for c in calls] == [0, 1, 2] * 3
    for number, (_, experts, uses) in enumerate(calls):
        chosen = trace.experts[trace.forward == number // 3, number % 3]
        ids, counts = np.unique(chosen[chosen >= 0], return_counts=True)
        assert experts == ids.tolist()
        assert uses == counts.tolist()


def test_slots_may_differ_by_layer():
    """Layer 0 with every expert resident loads each once; layer 1 with one slot loads more."""
    trace = random_trace(2)
    counters = simulate(trace, np.array([8, 1])).counters
    assert simulate(trace, np.int64(3)).slots == (3, 3)
    assert counters.loads.sum(axis=0)[0] == len(np.unique(trace.experts[:, 0].clip(0)))
    assert counters.loads.sum(axis=0)[1] == simulate(trace, 1).counters.loads.sum(axis=0)[1]


def test_a_policy_may_come_from_a_function():
    """A class from outside the registry, or one with options, is used as given."""
    trace = random_trace(4)
    assert simulate(trace, 3, LRU).counters == simulate(trace, 3, "lru").counters
    by_name = simulate(trace, 3, "lfu", policy_options={"gamma": 0.5})
    assert by_name.counters == simulate(trace, 3, lambda: DecayedLFU(0.5)).counters


@pytest.mark.parametrize(
    ("slots", "error", "text"),
    [(0, CacheTooSmallError, "at least 1"), (9, MelinoeError, "at most 8")],
)
def test_impossible_slots_are_refused(slots, error, text):
    """No slot, or more slots than experts: the error says what is possible."""
    with pytest.raises(error, match=text):
        simulate(random_trace(0), slots)


def test_slots_and_prefetches_must_name_every_layer():
    """Two layers, one number: an error, not a guess."""
    trace = random_trace(0)
    with pytest.raises(ValueError, match="1 layers of 2"):
        simulate(trace, [3])
    with pytest.raises(ValueError, match="1 layers of 2"):
        simulate(trace, 3, prefetch=Listed({0: [[1]]}))


def test_an_empty_trace_costs_nothing():
    """No rows: no units, all counters zero."""
    simulation = simulate(random_trace(0, sequences=0), 2)
    assert simulation.per_sequence == []
    assert simulation.counters == Counters(2)


def test_what_is_computed_on_the_host_is_a_miss_but_no_load():
    """Two slots hold {0,1} by prefetch and nothing is loaded: of {0,2} {1,2} {0,1} half miss."""
    trace = trace_of([[0, 2]], [[1, 2]], [[0, 1]], num_experts=4, top_k=2)
    simulation = simulate(
        trace, 2, prefetch=Listed({0: [[0, 1]]}), load=lambda missing: 0, steps=True, policy="lru"
    )
    assert simulation.counters.hit_rate() == 4 / 6
    assert simulation.counters.loads.sum() == 0
    assert simulation.counters.prefetch_loads.tolist() == [2]
    assert simulation.steps.on_host.tolist() == [[1], [1], [0]]
    assert simulation.steps.on_host_uses.tolist() == [[1], [1], [0]]
    assert simulation.counters.on_host.sum() == 2
    assert simulation.counters.adjusted_hit_rate() == 1 - (2 + 2) / 6  # two prefetched, two there
    assert simulation.counters.zero_miss_tokens.sum() == 1  # who is computed there waits, too
    assert simulation.steps.experts.tolist() == [[2], [2], [2]]
    assert simulation.steps.ahead.tolist() == [[2], [0], [0]]


def test_loading_everything_partly_is_loading_everything():
    """Where requests fit, `load` of all that is missing counts as no `load` at all."""
    trace = random_trace(1, prompt=1)
    whole = simulate(trace, 4, steps=True)
    partly = simulate(trace, 4, steps=True, load=len)
    assert partly.counters.loads.sum() == whole.counters.loads.sum()
    assert partly.counters.hit_rate() == whole.counters.hit_rate()
    assert not partly.steps.on_host.any()
