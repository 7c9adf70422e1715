"""Routers are found in every family, and what is recorded is what ran."""

import pytest
import torch
from tiny import VOCAB, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from melinoe.errors import UnsupportedModelError
from melinoe.moe.base_routers import BaseRouters
from melinoe.moe.routing import RoutingRecorder, find_routers, fingerprint, router_logits

# One of each way to choose: softmax, correction bias, router bias, a gate of its own class with
# a submodule, sparsemixer, probabilities as the router's first output.
KINDS = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss", "afmoe", "phimoe", "gemma4", "lfm2_moe")


def ids(seed=0, batch=2, tokens=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, tokens), generator=generator)


def record(model, input_ids):
    with RoutingRecorder(find_routers(model)) as recorder:
        model(input_ids)
        return recorder.take()


@pytest.mark.parametrize("family", KINDS)
def test_recorded_ids_are_what_the_experts_computed(family):
    """An independent look: the experts module's forward is replaced by one that keeps its ids."""
    model = tiny_model(family)
    seen = []
    for router in find_routers(model):
        forward = router.experts.forward

        def spy(hidden_states, top_k_index, top_k_weights, forward=forward):
            seen.append(top_k_index.clone())
            return forward(hidden_states, top_k_index, top_k_weights)

        router.experts.forward = spy
    routings = record(model, ids())
    assert len(routings) == len(seen) > 0
    for routing, index in zip(routings, seen, strict=True):
        assert torch.equal(routing.top_k_index, index.reshape(routing.top_k_index.shape))
        assert routing.logits.shape == (14, routing.router.num_logits)


@pytest.mark.parametrize("family", KINDS)
def test_recorded_logits_train_the_router(family):
    """A loss on the logits gives the router's weight a gradient."""
    model = tiny_model(family)
    for routing in record(model, ids()):
        routing.router.weight.grad = None
        routing.logits[:, 0].sum().backward(retain_graph=True)
        assert routing.router.weight.grad is not None and routing.router.weight.grad.any()


@pytest.mark.parametrize("family", KINDS)
def test_base_routers_repeat_the_logits_until_the_router_changes(family):
    """On the inputs the router saw they agree exactly, and keep to it when its weight moves."""
    model = tiny_model(family)
    base = BaseRouters(find_routers(model))
    before = record(model, ids())[0]
    torch.testing.assert_close(base.logits(before), before.logits.detach())
    with torch.no_grad():
        before.router.weight.add_(torch.randn(before.router.weight.shape))
    after = record(model, ids())[0]
    torch.testing.assert_close(base.logits(after), before.logits.detach())
    assert not torch.allclose(after.logits, before.logits)


def test_recording_changes_nothing_and_leaves_nothing():
    """Logits with and without the recorder are equal bit for bit, and no hook stays."""
    model = tiny_model("olmoe")
    plain = model(ids()).logits
    with RoutingRecorder(find_routers(model)):
        assert torch.equal(model(ids()).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fingerprint_names_the_routing_and_nothing_else():
    """It survives a change of type and of the experts, and changes with one router weight."""
    model = tiny_model("olmoe", dtype=torch.bfloat16)
    first = fingerprint(model)
    assert len(first) == 64 and first == fingerprint(tiny_model("olmoe", dtype=torch.bfloat16))
    with torch.no_grad():
        find_routers(model)[0].experts.down_proj.add_(1.0)
    assert fingerprint(model.float()) == first
    with torch.no_grad():
        find_routers(model)[-1].weight[0, 0] += 0.01
    assert fingerprint(model) != first


def test_a_correction_bias_belongs_to_the_fingerprint():
    """It decides choices, so a trace of another bias is a trace of another model."""
    model = tiny_model("deepseek_v3")
    first = fingerprint(model)
    find_routers(model)[0].module.e_score_correction_bias.add_(1.0)
    assert fingerprint(model) != first


def test_a_dense_model_has_no_routers():
    """The refusal is one sentence with the family's name."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        find_routers(GPT2LMHeadModel(config))


def test_a_router_without_a_weight_per_expert_is_refused():
    """A family whose router was replaced by something else cannot be trained."""
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.gate = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no trainable router"):
        find_routers(model)


@pytest.mark.parametrize("family", ["olmoe", "granitemoe"])
def test_logits_are_what_the_routers_weight_makes_of_its_inputs(family):
    """Some families of transformers 5.17 return what was chosen first, and logits last."""
    model = tiny_model(family)
    with torch.no_grad():
        for routing in record(model, ids()):
            hidden = routing.inputs[0][0]
            expected = hidden.reshape(-1, hidden.shape[-1]) @ routing.router.weight.T
            torch.testing.assert_close(routing.logits.float(), expected.float())


def test_logits_behind_ids_are_found_among_what_a_router_returns():
    """As transformers 5.17 has it for Granite: ids, their weights, logits."""
    logits = torch.randn(2, 3, 8)
    weights, chosen = logits.softmax(-1).topk(2)
    for output in (logits, (logits, weights, chosen), (chosen, weights, logits)):
        assert torch.equal(router_logits(output), logits.reshape(6, 8))
