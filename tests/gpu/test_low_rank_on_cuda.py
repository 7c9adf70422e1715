"""The low-rank path on a GPU: the CPU's numbers, and zeros where no token went."""

import pytest
import tiny
import torch

from melinoe.finetune.parts import LowRankUpdates
from melinoe.moe.experts import find_experts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 8), (torch.bfloat16, 3)])
def test_gradients_of_unused_experts_are_zero_and_the_others_the_cpus(family, dtype, rank):
    """Kernels may leave the gradient of an empty group unwritten; ranks of any size are aligned."""
    gradients, outputs = [], []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = tiny.tiny_model(family, dtype=dtype).to(device, kind).requires_grad_(False)
        updates = LowRankUpdates(model, find_experts(model), rank=rank, alpha=rank, seed=0)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in updates.parameters().items():
            if ".lora_B." in name:
                noise = torch.empty(parameter.shape).normal_(std=0.2, generator=generator)
                parameter.data.copy_(noise)
        layer = updates.layers[0]
        generator.manual_seed(4)
        hidden = torch.randn(24, 32, generator=generator).to(device, kind)
        index = torch.tensor([[0, 3], [3, 5], [5, 0]], device=device).repeat(8, 1)
        weights = torch.rand(24, 2, generator=generator).to(device, kind)
        output = layer.module(hidden, index, weights)
        output.square().sum().backward()
        outputs.append(output.detach().float().cpu())
        own = updates.of(layer)
        gradients.append({n: p.grad.float().cpu() for n, p in own.named_parameters()})
    torch.testing.assert_close(
        outputs[1], outputs[0], rtol=0.05, atol=0.05 * outputs[0].abs().max()
    )
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        assert {e for e in range(8) if found[e].any()} == {0, 3, 5}
        assert (found - expected).norm() < 0.05 * expected.norm()
