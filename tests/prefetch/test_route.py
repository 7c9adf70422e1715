"""Which layer comes next is learned from the pass before, alike in simulator and runtime."""

import numpy as np
import pytest
import torch

from melinoe import attach
from melinoe.cache.ahead import Route
from melinoe.cache.prefetch import Prefetcher, prefetcher
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from tests.tiny import tiny_model


def run(route, *layers):
    """One whole pass that reaches *layers*."""
    for layer in layers:
        route.reached(layer)
    route.end_pass()


def test_before_any_pass_the_next_layer_is_the_next_number():
    """Three layers: 0 -> 1 -> 2 -> none."""
    assert [Route(3).after(layer) for layer in range(3)] == [1, 2, None]


def test_a_pass_teaches_its_order_and_leaves_what_it_left_out():
    """Four layers, a pass of 0 and 2: after 0 comes 2, after 2 nothing; of 1 it taught nothing."""
    route = Route(4)
    run(route, 0, 2)
    assert [route.after(layer) for layer in range(4)] == [2, 2, None, None]
    run(route, 0, 1, 2, 3)
    assert [route.after(layer) for layer in range(4)] == [1, 2, 3, None]


def test_a_pass_that_broke_off_teaches_nothing():
    """Layer 1 was skipped, then the pass failed: the next number is still the best guess."""
    route = Route(3)
    route.reached(0)
    route.reached(2)
    assert route.after(0) == 1  # nothing is learned before the end
    route.drop_pass()
    route.end_pass()
    assert [route.after(layer) for layer in range(3)] == [1, 2, None]


def test_between_layers_the_layer_that_asked_next_before_is_loaded_for():
    """
    Layers 0 and 2 run, 1 does not: 3 is brought for layer 1 in the first pass, for 2 in the rest.

    Of the three copied ahead (one to layer 1, and 3 then 3 to layer 2, where 0 evicts it in
    between) the last is used.
    """

    class Three(Prefetcher):
        name = "three"

        def after_router(self, layer, chosen, guess):
            return [3]

    builder = TraceBuilder(3, 4, 1)
    for chosen in ([0, -1, 0], [0, -1, 0], [0, -1, 3]):
        builder.add_forward(np.array(chosen)[None, :, None], 0, 1)
    done = simulate(builder.trace(), 1, prefetch=Three(), steps=True)
    assert done.steps.between.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert done.counters.prefetch_used.tolist() == [[0, 0, 0], [0, 0, 1]]


@pytest.fixture(scope="module")
def two_stacks():
    """A model whose every decoder layer has one stack of experts for text and one for images."""
    model = tiny_model("ernie4_5_vl_moe", num_hidden_layers=3)
    with torch.no_grad():  # layers add next to nothing, so that what is said early is right
        for name, parameter in model.named_parameters():
            if name.endswith(("down_proj", "down_proj.weight", "o_proj.weight")):
                parameter.mul_(1e-3)
            elif name.endswith("gate.weight"):
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize(("policy", "slots"), [("lru", 2), ("lfu", 3)])
def test_of_two_stacks_in_a_decoder_layer_the_one_that_runs_is_prefetched(
    two_stacks, policy, slots
):
    """
    Text runs stacks 0 and 2 of four: router 2 is asked about layer 0, nobody about 1 and 3.

    Its layers change the hidden state so little that what router 2 says early is what it says
    again when asked. Simulator and runtime agree on every counter, also of a second text.
    """
    ids = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 4, 11]])]

    def answer(one):
        torch.manual_seed(0)  # sampled, because the likeliest token is always the same one
        return two_stacks.generate(one, max_new_tokens=10, do_sample=True, pad_token_id=0)

    plain = [answer(one) for one in ids]
    chosen = prefetcher("next-router")
    with attach(two_stacks, slots=slots, policy=policy) as handle:
        with handle.record(guesses=True) as recorder:
            for one, text in zip(ids, plain, strict=True):
                with handle.prefetching(chosen):
                    assert torch.equal(answer(one), text)
        counted, trace = handle.counters, recorder.trace()
    decoding = trace.kind == 1
    assert (trace.experts[decoding] >= 0).any((0, 2)).tolist() == [True, False, True, False]
    assert (trace.guesses[decoding] >= 0).any((0, 2)).tolist() == [False, False, True, False]
    assert (counted.prefetch_loads > 0).tolist() == [False, False, True, False]
    assert counted.prefetch_precision() > 0.6
    assert simulate(trace, slots, policy, prefetch=chosen).counters == counted
    early, ran = trace.guesses[decoding][:, 2], trace.experts[decoding][:, 2]
    assert (early[..., :, None] == ran[..., None, :]).any(-1).mean() > 0.7
