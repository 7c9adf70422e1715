"""Slots and policies that differ by layer."""

import pytest
from small_olmoe import EXPERTS, LAYERS, PROMPT_TEXT, tiny_model, words_tokenizer

from melinoe import attach
from melinoe.cache.curves import allocate, miss_curves
from melinoe.cache.locality import popularity
from melinoe.cache.simulator import simulate
from melinoe.errors import BudgetError, MelinoeError
from melinoe.generate import generate

PROMPTS = [PROMPT_TEXT, "w7 w8 w9", "w20"]


def serve(slots, policy="lru", options=None):
    """Generated ids, counters and trace of three prompts."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=slots, policy=policy, policy_options=options) as handle:
        with handle.record() as recorder:
            ids = [generate(model, handle, tokenizer, prompt, 8).ids for prompt in PROMPTS]
        return ids, handle.counters, recorder.trace(), handle


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_slots_may_differ_by_layer_and_count_as_simulated(policy):
    """One slot in layer 0, more in each that follows: the plain ids, and the simulator's counts."""
    slots = [1 + 2 * layer for layer in range(LAYERS)]
    ids, counted, trace, handle = serve(slots, policy)
    assert handle.slots_by_layer == tuple(slots) and handle.slots == max(slots)
    assert simulate(trace, slots, policy).counters == counted
    assert ids == serve(EXPERTS)[0]


def test_an_allocation_from_a_trace_can_be_served():
    """What `allocate` makes of a trace is what `attach` takes, and it costs what it promised."""
    trace = serve(EXPERTS)[2]
    cost = miss_curves(trace, "lru").sum(axis=0)
    slots = allocate(cost, 3 * LAYERS)
    counted = serve(slots)[1]
    assert counted.loads.sum() == sum(cost[n, c - 1] for n, c in enumerate(slots))


def test_a_static_policy_has_each_layer_s_popularity():
    """Counts of another run, per layer, served and simulated alike."""
    popular = popularity(serve(EXPERTS)[2])
    options = {"popularity": popular.tolist()}
    _, counted, trace, _ = serve(3, "static", options)
    assert simulate(trace, 3, "static", policy_options=options).counters == counted
    with pytest.raises(MelinoeError, match="popularity"):
        attach(tiny_model(), slots=3, policy="static")


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ([2], f"1 layers of {LAYERS}"),
        ([0] * LAYERS, "layer 0"),
        ([EXPERTS + 1] * LAYERS, "layer 0"),
    ],
)
def test_impossible_slots_by_layer_are_refused(slots, text):
    """Too few numbers, no slot, or more than experts: one sentence, the model untouched."""
    model = tiny_model()
    with pytest.raises(BudgetError, match=text):
        attach(model, slots=slots)
    attach(model, slots=2).detach()
