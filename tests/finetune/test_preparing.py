"""Frozen weights keep their type; the model computes in float32 all the same."""

import copy

import pytest
import torch
from small_runs import examples, settings
from tiny import tiny_model

from melinoe.finetune import train
from melinoe.finetune.preparing import PIECE, ReadyModel, _Linear, widened
from melinoe.moe.dispatch import computed_by
from melinoe.moe.experts import find_experts
from melinoe.moe.grouped import grouped_experts
from melinoe.moe.routing import find_routers

IDS = torch.arange(3, 15)[None]


def narrow_model(family):
    """Weights of sixteen bits."""
    return tiny_model(family).to(torch.bfloat16)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_widened_model_computes_what_the_cast_one_does(family):
    """Logits of a copy that was cast to float32 as a whole, by transformers' own code."""
    model = narrow_model(family).eval()
    cast = copy.deepcopy(model).float()
    before = {name: p.clone() for name, p in model.named_parameters()}
    layers = find_experts(model)
    with torch.no_grad():
        expected = cast(IDS).logits
        modules = [layer.module for layer in layers]
        with widened(model, layers), computed_by(model, modules, grouped_experts):
            found = model(IDS).logits
        again = model(IDS).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert again.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[name])


def test_large_frozen_weights_keep_their_type_in_training():
    """Experts, projections, embeddings; all that is cast up is small."""
    model = narrow_model("olmoe")
    ReadyModel(model, settings(compute_dtype="float32", train="router"))
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert all("norm" in name or "gate.weight" in name for name in wide)
    assert any("embed_tokens" in name for name in kept)
    for layer in find_experts(model):
        for tensor in layer.tensors:
            assert layer.module.get_parameter(tensor.name).dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["router", "router+experts", "router+experts+attention"])
def test_a_run_on_narrow_weights_is_that_on_the_cast_model(part):
    """The same terms step by step; the result has the checkpoint's type, and no hook is left."""
    narrow = narrow_model("olmoe")
    cast = copy.deepcopy(narrow).float()
    chosen = settings(train=part, steps=3)
    rows = train(narrow, examples(), chosen, pad_token_id=0).rows
    expected = train(cast, examples(), chosen, pad_token_id=0).rows
    for row, theirs in zip(rows, expected, strict=True):
        assert row["nll"] == pytest.approx(theirs["nll"], rel=1e-4)
        assert row["cache"] == pytest.approx(theirs["cache"], rel=1e-4)
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    assert "forward" not in vars(narrow.lm_head)
    assert narrow(IDS).logits.dtype == torch.bfloat16


def test_a_linear_layer_in_pieces_has_the_gradient_of_the_whole():
    """More rows than one piece holds, and a bias."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, 4096, generator=generator, requires_grad=True)
    weight = torch.randn(2 * PIECE // 4096 + 5, 4096, generator=generator).bfloat16()
    bias = torch.randn(weight.shape[0], generator=generator)
    out = _Linear.apply(inputs, weight, bias)
    whole = torch.nn.functional.linear(inputs, weight.float(), bias)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-3)
    out.square().sum().backward()
    (expected,) = torch.autograd.grad(
        torch.nn.functional.linear(inputs, weight.float(), bias).square().sum(), inputs
    )
    torch.testing.assert_close(inputs.grad, expected, rtol=1e-4, atol=1e-2)


def test_routers_are_no_wide_layers():
    """They are trained in float32 themselves."""
    model = narrow_model("olmoe")
    with widened(model, find_experts(model)):
        assert all(one.weight.dtype == torch.float32 for one in find_routers(model))
