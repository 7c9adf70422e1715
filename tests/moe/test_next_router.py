"""The next layer's router, asked early: of every family, and without anybody noticing."""

import pytest
import torch
from tiny import families, tiny_model

from melinoe.errors import UnsupportedModelError
from melinoe.moe.next_router import NextRouters
from melinoe.moe.routing import RoutingRecorder, find_routers

TOKENS = 6


def ids(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 30, (1, TOKENS), generator=generator)


@pytest.mark.parametrize("family", families())
def test_a_router_shown_its_own_inputs_says_what_then_ran(family):
    """
    For every layer but the first, told that the layer before saw what this one saw.

    So of a hidden state that did not change the guess would be right. Families whose router gives
    logits alone choose by biases that are zero here, or by groups of which there is one.
    """
    model = tiny_model(family)
    routers = find_routers(model)
    with torch.no_grad():  # far apart, so that no rounding decides
        for router in routers:
            router.weight.normal_(std=0.5)
    with torch.no_grad(), RoutingRecorder(routers) as recorder:
        model(input_ids=ids())
        ran = {one.router.index: one for one in recorder.take()}
    asked = NextRouters(routers)
    for layer, routing in ran.items():
        if layer:
            asked._inputs[layer - 1] = routing.inputs
            rows, top_k = routing.top_k_index.shape
            guess = asked.guess(layer - 1, layer, rows, top_k)
            assert guess.shape == (rows, top_k)
            assert torch.equal(guess.sort().values, routing.top_k_index.sort().values)
    asked.close()


def test_a_guess_is_the_next_gate_on_this_layer_s_hidden_state():
    """OLMoE by hand: the gate's input in layer 0 times the gate of layer 1, its two highest."""
    model, seen = tiny_model("olmoe"), []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hook = gates[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    asked = NextRouters(find_routers(model))
    with torch.no_grad():
        model(input_ids=ids())
        guess = asked.guess(0, 1, TOKENS, 2)
        logits = seen[0].reshape(TOKENS, -1) @ gates[1].weight.T
    hook.remove()
    asked.close()
    assert torch.equal(guess, logits.topk(2).indices)
    assert not gates[0]._forward_pre_hooks


def test_nobody_who_listens_to_the_routers_hears_of_it():
    """Hooks on the model's routers run once a layer, though router 1 was asked twice."""
    model, heard = tiny_model("olmoe"), []
    routers = find_routers(model)
    hooks = [r.module.register_forward_hook(lambda *_, i=r.index: heard.append(i)) for r in routers]
    asked = NextRouters(routers)
    with torch.no_grad():
        model(input_ids=ids())
        asked.guess(0, 1, TOKENS, 2)
    assert heard == [0, 1]
    for hook in hooks:
        hook.remove()
    asked.close()


def test_the_model_s_own_parameters_are_asked():
    """A change of a router's weight, in place or of the parameter, shows in the next guess."""
    model = tiny_model("olmoe")
    gate = model.model.layers[1].mlp.gate
    asked = NextRouters(find_routers(model))
    for new in (torch.zeros(8, 32), torch.ones(8, 32)):
        new[3] = 5.0
        gate.weight.data = new
        state = torch.ones(TOKENS, 32)
        asked._inputs[0] = ((state,), {})
        assert (asked.guess(0, 1, TOKENS, 1)[:, 0] == 3).all()
    asked.close()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda asked: asked._inputs.clear(), "did not run before it"),
        (
            lambda asked: asked._inputs.update({0: ((torch.ones(TOKENS, 5),), {})}),
            "take its inputs",
        ),
        (lambda asked: asked._inputs.update({0: ((torch.ones(2, 32),), {})}), "for each token"),
    ],
)
def test_a_router_that_cannot_be_asked_is_refused_by_name(break_it, words):
    """One sentence with the router's name and the way out, never a silent nothing."""
    model = tiny_model("olmoe")
    asked = NextRouters(find_routers(model))
    with torch.no_grad():
        model(input_ids=ids())
    break_it(asked)
    with pytest.raises(UnsupportedModelError, match=rf"layers\.1\.mlp\.gate.*{words}"):
        asked.guess(0, 1, TOKENS, 2)
    asked.close()


def test_routers_of_different_widths_are_refused_at_once():
    """The second reads twice as many numbers as the first sees."""
    routers = find_routers(tiny_model("olmoe"))
    routers[1].module.weight = torch.nn.Parameter(torch.zeros(8, 64))
    with pytest.raises(UnsupportedModelError, match="of 64 numbers"):
        NextRouters(routers)
