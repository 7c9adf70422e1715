"""The low-rank path per active expert: PEFT's numbers, transformers' bits, what training asks."""

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from transformers.integrations.moe import grouped_mm_experts_forward

from melinoe import attach
from melinoe.config import FinetuneSettings
from melinoe.errors import AttachError, TrainingError
from melinoe.finetune.adapter import adapter_of, from_peft_A, from_peft_B
from melinoe.finetune.parts import LowRankUpdates, TrainedParts, add_update, make_trainable
from melinoe.moe.experts import find_experts
from melinoe.moe.grouped import grouped_experts
from melinoe.moe.routing import find_routers

# One of each layout: standard; transposed; own gate; transposed, biased, interleaved, own gate;
# norm after each expert; no gate; transposed, biased, concatenated, own gate.
LAYOUTS = (
    "olmoe",
    "aria",
    "deepseek_v4",
    "gpt_oss",
    "muse_spark",
    "nemotron_h",
    "openai_privacy_filter",
)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 40, 7, 60, 11]])


def output(model, ids=IDS):
    """Logits, or hidden states of a base model, of a call that may draw random numbers."""
    torch.manual_seed(1)
    result = model(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state


def wrapped_by_peft(model, rank, alpha):
    """PEFT's own model over the same parameters, with factors that are both not zero."""
    targets = [
        f"{layer.name}.{tensor.name}"
        for layer in find_experts(model)
        for tensor in layer.tensors
        if tensor.name.endswith("proj")
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[], target_parameters=targets)
    torch.manual_seed(7)
    tuner = LoraModel(model, config, "default")
    wrappers = {}
    for name, module in tuner.model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.2)
            wrappers[name.replace(".base_layer", ""), module.parameter_name] = module
    return tuner, wrappers


def copy_factors(updates, wrappers):
    """PEFT's factors into ours."""
    for layer in updates.layers:
        ours = updates.of(layer)
        for name in ours.names:
            theirs = wrappers[layer.name, name]
            a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            ours.lora_A[name].data = from_peft_A(a.detach(), layer.num_experts).clone()
            ours.lora_B[name].data = from_peft_B(b.detach(), layer.num_experts).clone()


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", LAYOUTS)
def test_outputs_and_gradients_are_pefts(family, dtype, monkeypatch):
    """Copied factors: outputs and the gradients of factors and routers agree to rounding."""
    if dtype == torch.float64:  # which torch's grouped kernel does not take
        product = torch.ops.transformers.grouped_mm_fallback
        monkeypatch.setattr(transformers.integrations.moe, "_grouped_mm", product)
    theirs, model = (tiny.tiny_model(family, dtype=dtype) for _ in range(2))
    for one in (theirs, model):
        one.set_experts_implementation("grouped_mm")
    plain = output(model).detach()
    for one in (theirs, model):
        one.requires_grad_(False)
        for router in find_routers(one):
            router.weight.requires_grad_(True)
    their_routers = [router.weight for router in find_routers(theirs)]
    tuner, wrappers = wrapped_by_peft(theirs, rank=3, alpha=6)
    for weight in their_routers:
        weight.requires_grad_(True)
    updates = LowRankUpdates(model, find_experts(model), rank=3, alpha=6, seed=0)
    copy_factors(updates, wrappers)

    expected, found = output(tuner.model), output(model)
    torch.manual_seed(2)
    direction = torch.randn(expected.shape, dtype=dtype)
    (expected * direction).sum().backward()
    (found * direction).sum().backward()

    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(found, expected, **close)
    assert (found - plain).abs().max() > 0.05
    for router, weight in zip(find_routers(model), their_routers, strict=True):
        torch.testing.assert_close(router.weight.grad, weight.grad, **close)
    for layer in updates.layers:
        own = updates.of(layer)
        for name in own.names:
            wrapper = wrappers[layer.name, name]
            for factors, theirs_, convert in (
                (own.lora_A, wrapper.lora_A, from_peft_A),
                (own.lora_B, wrapper.lora_B, from_peft_B),
            ):
                wanted = convert(theirs_["default"].weight.grad, layer.num_experts)
                assert wanted.any()
                torch.testing.assert_close(factors[name].grad, wanted, **close)


def experts_of(family, **settings):
    """The first experts module of a family, and inputs of its width."""
    module = find_experts(tiny.tiny_model(family, **settings))[0].module
    width = module.down_proj.shape[-1 if module.is_transposed else 1]
    torch.manual_seed(0)
    hidden = torch.randn(9, width, dtype=module.down_proj.dtype)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(9)])
    return module, hidden, index, torch.rand(9, 3, dtype=module.down_proj.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LAYOUTS)
def test_without_updates_the_bits_are_those_of_transformers(family, dtype):
    """The same order of operations: equal in every bit."""
    module, *inputs = experts_of(family, dtype=dtype)
    with torch.no_grad():
        expected = grouped_mm_experts_forward(module, *inputs)
        assert torch.equal(grouped_experts(module, *inputs), expected)


@pytest.mark.parametrize("none", [-1, 8, 9])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_choice_of_no_expert_gives_nothing_and_gets_nothing(family, none):
    """Equal to weight zero, forward and backward; its weight's own gradient is zero."""
    module, hidden, index, weights = experts_of(family)
    gone = torch.zeros(9, 3, dtype=torch.bool)
    gone[1, 0] = gone[4, 2] = True
    gradients = []
    for ids, scale in (
        (index, weights.masked_fill(gone, 0)),
        (index.masked_fill(gone, none), weights),
    ):
        states = hidden.clone().requires_grad_(True)
        scale = scale.clone().requires_grad_(True)
        result = grouped_experts(module, states, ids, scale)
        result.square().sum().backward()
        gradients.append((result.detach(), states.grad, scale.grad))
    (plain, into, _), (result, states, scales) = gradients
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(states, into)
    assert not scales[gone].any() and scales[~gone].all()


def updated(family="olmoe", rank=4, **settings):
    """A model with updates whose factors are both not zero."""
    model = tiny.tiny_model(family, **settings).requires_grad_(False)
    updates = LowRankUpdates(model, find_experts(model), rank=rank, alpha=2 * rank, seed=0)
    torch.manual_seed(3)
    for name, parameter in updates.parameters().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, updates


def test_an_expert_that_no_token_chose_gets_a_gradient_of_zeros():
    """Not none: distributed training waits for a gradient of every parameter."""
    _, updates = updated()
    layer = updates.layers[0]
    index = torch.tensor([[0, 3], [3, 0], [0, 5]])
    layer.module(torch.randn(3, 32), index, torch.rand(3, 2)).sum().backward()
    for parameter in updates.of(layer).parameters():
        assert parameter.grad is not None
        assert {e for e in range(8) if parameter.grad[e].any()} == {0, 3, 5}


def test_merged_weights_compute_what_the_updates_did():
    """Layouts with and without transposition; afterwards the model is plain and serves."""
    for family in ("olmoe", "gpt_oss", "nemotron_h"):
        model, updates = updated(family)
        before = set(model.state_dict())
        implementation = model.config._experts_implementation
        with torch.no_grad():
            expected = output(model)
            merge(model, updates)
            torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)
        assert before - set(model.state_dict()) == set(updates_names(before))
        assert implementation == "melinoe" != model.config._experts_implementation
        with attach(model, slots=3):
            torch.testing.assert_close(output(model).detach(), expected, rtol=1e-4, atol=1e-4)


def merge(model, updates):
    """Take the updates off, and add them to the weights."""
    adapter = adapter_of(TrainedParts({}, {}, [], updates))
    updates.remove()
    adapter.apply(model)


def updates_names(names):
    return (name for name in names if ".low_rank." in name)


@pytest.mark.filterwarnings("default")
def test_layers_that_share_their_weights_share_one_update():
    """An encoder and a decoder over the same experts: added twice, the update would be doubled."""
    model, updates = updated("diffusion_gemma")
    assert len(updates.layers) == 4 and len(updates.parameters()) == 2 * 4
    with torch.no_grad():
        expected = output(model)
        merge(model, updates)
        torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-4)


def test_removed_without_merging_the_model_is_what_it_was():
    """Bit for bit, experts function included."""
    plain = output(tiny.tiny_model("olmoe"))
    model, updates = updated()
    assert not torch.equal(output(model), plain)
    updates.remove()
    assert torch.equal(output(model), plain)


def test_experts_with_updates_on_them_are_not_served():
    """Their weights alone would be computed; the message says what to do."""
    model, _ = updated()
    with pytest.raises(AttachError, match="has not ended"):
        attach(model, slots=3)


def test_in_bfloat16_the_update_is_nearer_to_the_truth_than_in_folded_weights():
    """Float64 is the truth; W + BA rounded to bfloat16, as PEFT computes, is further from it."""
    _, updates = updated(dtype=torch.bfloat16)
    layer, own = updates.layers[0], updates.of(updates.layers[0])
    for tensor in own.lora_B.values():
        tensor.data *= 0.01  # updates near 0.001 of weights near 0.3
    hidden, index = torch.randn(1024, 32).bfloat16(), torch.arange(1024)[:, None] % 8
    inputs = hidden, index, torch.ones(1024, 1, dtype=torch.bfloat16)
    exact, folded = (
        find_experts(tiny.tiny_model("olmoe", dtype=torch.bfloat16))[0].module for _ in range(2)
    )
    exact.double()
    wide = hidden.double(), index, inputs[2].double()
    with torch.no_grad():
        plain, base = grouped_experts(layer.module, *inputs), grouped_experts(exact, *wide)
        for name in own.names:
            pair = own.lora_A[name], own.lora_B[name], own.scaling
            add_update(exact.get_parameter(name), *pair)
            add_update(folded.get_parameter(name), *pair)
        true = grouped_experts(exact, *wide) - base
        error_of = [
            float((result - plain - true).norm() / true.norm())
            for result in (layer.module(*inputs), grouped_experts(folded, *inputs))
        ]
    assert error_of[0] < 0.85 * error_of[1]


def test_autocast_and_recomputation_change_no_gradient():
    """Under bfloat16 autocast over bfloat16 weights, checkpointed and not: equal bits, float32."""
    gradients = []
    for recompute in (False, True):
        model, updates = updated(dtype=torch.bfloat16)
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
        runs = []
        updates.layers[0].module.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert len(runs) == 1 + recompute
        gradients.append({name: p.grad for name, p in updates.parameters().items()})
    plain, recomputed = gradients
    for name, gradient in plain.items():
        assert gradient.dtype == torch.float32 and gradient.any()
        assert torch.equal(recomputed[name], gradient)


def test_the_seed_decides_the_start_and_nothing_else_does():
    """The global generator neither matters nor moves; A is uniform as PEFT's, B is zero."""
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.seed() % 1000)
        state = torch.get_rng_state()
        model = tiny.tiny_model("olmoe")
        state = torch.get_rng_state()
        updates = LowRankUpdates(model, find_experts(model), rank=64, alpha=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        starts.append(updates.of(updates.layers[1]))
    first, again, other = (one.lora_A["gate_up_proj"] for one in starts)
    assert torch.equal(first, again) and not torch.equal(first, other)
    bound = 32**-0.5
    assert 0.99 * bound < first.max() <= bound
    assert first.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not any(b.any() for b in starts[0].lora_B.values())


def test_frozen_routers_are_refused_by_the_familys_name():
    """Nothing of such a model could learn to reuse experts."""
    model = tiny.tiny_model("mixtral").requires_grad_(False)
    with pytest.raises(TrainingError, match="routers of mixtral are frozen"):
        make_trainable(model, find_routers(model), find_experts(model), FinetuneSettings(), 4)
