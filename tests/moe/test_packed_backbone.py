"""A packed backbone computes what its blocks mean, in every family, and routers stay exact."""

import pytest
import tiny
import torch
from torch import nn

from melinoe.experts.formats import named_format
from melinoe.experts.packed import MANY, PackedLinear
from melinoe.moe.packed_backbone import pack_backbone
from melinoe.moe.routing import fingerprint

INT8 = named_format("int8")
IDS = torch.randint(3, tiny.VOCAB, (1, 5), generator=torch.Generator().manual_seed(0))


def output(model):
    torch.manual_seed(1)
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result["logits"] if "logits" in result else result["last_hidden_state"]


@pytest.mark.parametrize("rows", [1, MANY - 1, 3 * MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_multiplies_by_what_its_block_means(rows, dtype):
    """Weight decoded by the format and multiplied in float64; few rows and many, with a bias."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).to(dtype)
    packed = PackedLinear(linear, INT8)
    x = torch.randn(2, rows, 96).to(dtype)
    meant = INT8.decode_matrix(INT8.encode_matrix(linear.weight.detach().float()), 40, 96)
    expected = x.double() @ meant.double().T + linear.bias.detach().double()
    with torch.no_grad():
        found = packed(x)
    assert found.dtype == dtype
    close = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("family", [f for f in tiny.families() if f not in tiny.CANNOT])
def test_every_family_runs_with_its_backbone_packed(family):
    """Close to the plain model; the routers are the same to the bit; nothing else is linear."""
    model = tiny.tiny_model(family)
    expected, before = output(model), fingerprint(model)
    count = pack_backbone(model, INT8)
    assert count > 0 and fingerprint(model) == before
    found = output(model)
    assert found.shape == expected.shape and bool(found.isfinite().all())


def test_its_text_is_that_of_the_decoded_weights():
    """OLMoE with every packed weight replaced by its meaning: the same logits but for rounding."""
    model, meant = tiny.tiny_model("olmoe"), tiny.tiny_model("olmoe")
    pack_backbone(model, INT8)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            parts = {kind: getattr(module, kind)[0] for kind in module._matrix.parts}
            weight = INT8.decode_matrix(parts, module.out_features, module.in_features)
            meant.get_submodule(name).weight.data = weight
    torch.testing.assert_close(output(model), output(meant), rtol=1e-5, atol=1e-5)
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
