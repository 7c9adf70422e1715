"""A layer with fewer experts than another has slots: nothing is named that does not exist."""

import numpy as np
import pytest
import torch

from melinoe import attach
from melinoe.cache.locality import popularity
from melinoe.cache.prefetch import Given, Prompt, most_wanted, prefetcher
from melinoe.cache.simulator import simulate
from melinoe.generate import generate, prompt_ids, trace_prompts
from melinoe.moe.routing import fingerprint
from melinoe.predictor import AdaptivePredictor, FitSettings, Prior, compare, fit
from tests.small_olmoe import tiny_model, words_tokenizer

FEWER, SLOTS = 3, 6
TEXTS = [[3 + number, 2 + (5 * number) % 30] for number in range(22)]


@pytest.fixture(scope="module")
def uneven():
    """Eight experts in layer 0, three in layer 1; and a trace of 22 texts, on all of them."""
    model, tokenizer = tiny_model(), words_tokenizer()
    block = model.model.layers[1].mlp
    for owner, names in ((block.experts, ("gate_up_proj", "down_proj")), (block.gate, ("weight",))):
        for name in names:
            whole = getattr(owner, name)
            setattr(owner, name, torch.nn.Parameter(whole[:FEWER].detach().clone()))
        owner.num_experts = FEWER
    with attach(model, slots=8) as handle:
        trace = trace_prompts(model, handle, tokenizer, TEXTS, 6)
    assert trace.num_experts == 8 and trace.experts[:, 1].max() < FEWER
    return model, tokenizer, trace


def quick(trace, model):
    """A predictor fitted for the number of slots."""
    embeddings = model.get_input_embeddings().weight
    return fit(trace, TEXTS, embeddings, SLOTS, settings=FitSettings(hidden=8, epochs=3))


def test_what_is_wanted_most_is_named_and_what_nobody_chose_is_not():
    """Counts 2, 0, 5, 2 and three slots: 2, then 0 and 3; known ones of a score of 0 as well."""
    wanted = np.array([[2, 0, 5, 2], [0, 1, 0, 0]])
    assert most_wanted(wanted, 3) == [[2, 0, 3], [1]]
    known = np.array([[True, True, False, True], [True, True, False, False]])
    assert most_wanted(wanted, 3, known) == [[0, 3, 1], [1, 0]]
    assert most_wanted(-wanted, 2, known) == [[1, 0], [0, 1]]


def test_no_strategy_names_an_expert_that_its_layer_does_not_have(uneven):
    """Six slots, three experts: popularity, predictor and prior name those."""
    model, _, trace = uneven
    prior = Prior(2, 8, fingerprint(model))
    prior.observe("", popularity(trace))
    predictor = quick(trace, model)
    learner = AdaptivePredictor(prior)
    given = Given(popularity(trace), predictor)
    named = [one.top([3, 4], SLOTS) for one in (predictor, learner)]
    for name in ("popularity", "predictor"):
        one = prefetcher(name, given)
        one.bind(model)
        named.append(one.before_completion(Prompt((SLOTS, FEWER), 8, (3, 4))))
    for first, second in named:
        assert len(first) == SLOTS and 0 < len(second) <= FEWER
        assert max(second) < FEWER and len(set(second)) == len(second)


@pytest.mark.parametrize("name", ["popularity", "prefill", "predictor", "next-router"])
@pytest.mark.parametrize("slots", [SLOTS, 2])
def test_served_and_simulated_counts_agree_where_layers_differ(uneven, name, slots):
    """Six slots of eight experts, and all three of three: the same loads on both sides."""
    model, tokenizer, trace = uneven
    ids = [prompt_ids(tokenizer, one) for one in TEXTS[:3]]
    chosen = prefetcher(name, Given(popularity(trace), quick(trace, model)))
    with attach(model, slots=slots, policy="lfu") as handle:
        with handle.record(guesses=True) as recorder:
            for one in ids:
                generate(model, handle, tokenizer, one, 6, prefetch=chosen)
        counted, own = handle.counters, recorder.trace()
    assert simulate(own, slots, "lfu", prefetch=chosen, prompts=ids).counters == counted
    if slots == 2:
        assert counted.prefetch_loads.sum() > 0


def test_rivals_are_compared_where_layers_differ(uneven):
    """More slots than a layer has experts: every guess serves all of it, and costs no more."""
    model, _, trace = uneven
    embeddings = model.get_input_embeddings().weight
    settings = FitSettings(hidden=8, epochs=2)
    found = compare(trace, TEXTS, embeddings, SLOTS, folds=2, settings=settings)
    # Layer 1 has three experts that stay once they came, so at most half of all is ever missed.
    assert found.recall["popularity"].mean >= 0.5 and found.ceiling.mean >= 0.5
    uses = 2 * 2
    assert all(0 <= one.mean <= uses for one in found.transfers.values())


def test_a_layer_that_no_text_uses_is_no_reason_to_refuse_a_trace(uneven):
    """Layer 1 left out of the trace: the predictor names nothing there, and recall is layer 0's."""
    from dataclasses import replace

    model, _, trace = uneven
    experts = trace.experts.copy()
    experts[:, 1] = -1
    predictor = quick(replace(trace, experts=experts), model)
    first, second = predictor.top([3, 4], SLOTS)
    assert len(first) == SLOTS and second == []
