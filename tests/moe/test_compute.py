"""Several plans give the bits of one; choices of no expert give nothing."""

import pytest
import tiny
import torch
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from melinoe import attach
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.experts import find_experts

FUNCTIONS = {"grouped_mm": grouped_mm_experts_forward, "batched_mm": batched_mm_experts_forward}


def request(dtype, tokens, seed):
    """Hidden states, distinct choices, weights; and a module with its slots in another order."""
    torch.manual_seed(seed)
    module = find_experts(tiny.tiny_model("gpt_oss", dtype=dtype))[0].module
    hidden = torch.randn(tokens, 32, dtype=dtype)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(tokens)])
    return module, hidden, index, torch.rand(tokens, 3, dtype=dtype)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_several_plans_equal_one_bit_for_bit(function, dtype, tokens):
    """Experts 0-2, 3-6 and 7 one after the other, against transformers' call on all of them."""
    forward = FUNCTIONS[function]
    for seed in range(5):
        module, hidden, index, weights = request(dtype, tokens, seed)
        with torch.no_grad():
            expected = forward(module, hidden, index, weights)
            pairs = Pairs(hidden, 3, dtype)
            for part in ([0, 1, 2], [3, 4, 5, 6], [7]):
                slots = {n: p.detach()[part] for n, p in module.named_parameters(recurse=False)}
                slot_of = torch.full((8,), -1)
                slot_of[part] = torch.arange(len(part))
                pairs.add(forward, StandIn(module, slots, len(part)), slot_of[index.reshape(-1)])
            assert torch.equal(pairs.total(weights), expected)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("sentinel", [8, 9])
def test_a_choice_of_no_expert_gives_nothing(family, sentinel):
    """Through an attached model's experts: what remains is eager's sum over the other choices."""
    model = tiny.tiny_model(family)
    module = find_experts(model)[0].module
    torch.manual_seed(0)
    hidden, weights = (
        torch.randn(4, module.down_proj.shape[-1 if module.is_transposed else 1]),
        None,
    )
    index = torch.stack([torch.randperm(8)[:2] for _ in range(4)])
    weights = torch.rand(4, 2)
    without = weights.clone()
    without[1, 0] = without[2, 1] = without[3, 0] = without[3, 1] = 0.0
    with torch.no_grad():
        expected = grouped_mm_experts_forward(module, hidden, index, without)
        index[1, 0] = index[2, 1] = index[3, 0] = index[3, 1] = sentinel
        with attach(model, slots=3) as handle:
            result = module(hidden, index, weights)
            counted = handle.counters
    torch.testing.assert_close(result, expected)
    assert (result[3] == 0).all()
    assert counted.uses[0, 0] == 4
