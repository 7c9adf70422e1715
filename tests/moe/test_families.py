"""Every family whose experts transformers decorates, offloaded, against transformers' eager."""

import pytest
import tiny
import torch

from melinoe import attach
from melinoe.cache.timing import Machine, Work
from melinoe.engine.misses import Misses
from melinoe.errors import UnsupportedModelError
from melinoe.moe.experts import find_experts

FAMILIES = [family for family in tiny.families() if family not in tiny.CANNOT]
ON_THE_HOST = Misses(
    "cpu", Machine(link_bytes_per_s=1.0, dram_bytes_per_s=1.0), Work(expert_bytes=1.0)
)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 40, 7, 60, 11]])


def output(model):
    """Logits, or hidden states of a base model, of a call that may draw random numbers."""
    torch.manual_seed(1)
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result.logits if "logits" in result else result.last_hidden_state


def generated(model):
    """Four greedy tokens, or None for a model that generates in another way or not at all."""
    generate = getattr(type(model), "generate", None)
    if generate is None or generate.__module__ != "transformers.generation.utils":
        return None
    if not model.can_generate():
        return None
    return model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_equal_eager(family):
    """
    Offloaded with fewer slots than experts it computes what eager does, with misses loaded or
    computed where they are; without experts it does not.
    """
    model = tiny.tiny_model(family)
    layers = find_experts(model)
    assert {layer.num_experts for layer in layers} == {tiny.NUM_EXPERTS}
    model.set_experts_implementation("eager")
    expected, tokens = output(model), generated(model)

    for slots in (1, 3):
        with attach(model, slots=slots) as handle:
            for layer in layers:
                assert all(p.numel() == 0 for p in layer.module.parameters(recurse=False))
            torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
            assert handle.counters.loads.sum() > 0
            if slots == 3:
                torch.testing.assert_close(generated(model), tokens)
    with attach(model, slots=3, miss=ON_THE_HOST) as handle:
        torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-5)
        assert handle.counters.loads.sum() == 0 < handle.counters.on_host.sum()

    with torch.no_grad():
        for layer in layers:
            layer.module.get_parameter("down_proj").zero_()
            if "down_proj_bias" in dict(layer.module.named_parameters()):
                layer.module.get_parameter("down_proj_bias").zero_()
    assert (output(model) - expected).abs().max() > 1e-3


def test_at_least_forty_families_run():
    """The families are found by looking; almost none is left out."""
    assert len(FAMILIES) >= 40
    assert len(tiny.CANNOT) <= 2


UNDECORATED = {
    "llama4_text": {"num_local_experts": 4, "head_dim": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 1,
        "attn_config": {"kv_n_heads": 4, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4},
    },
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
    "longcat_flash": {"n_routed_experts": 4, "num_layers": 1},
    "nllb-moe": {"num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "switch_transformers": {"num_experts": 4, "d_kv": 8, "num_layers": 2, "d_ff": 16},
    "step3p7": {"mlp_layer_types": ["dense", "sparse"]},
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", UNDECORATED)
def test_an_undecorated_family_is_refused_by_name(family):
    """It has experts, but no function can be put in their place; the message names the family."""
    model = tiny.tiny_of_type(family, UNDECORATED[family])
    with pytest.raises(UnsupportedModelError, match=f"{family}.*has experts"):
        find_experts(model)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_dense_model_is_refused_by_name(family):
    """There is nothing to offload, and the message says so."""
    with pytest.raises(UnsupportedModelError, match=f"{family} has no mixture-of-experts layers"):
        find_experts(tiny.tiny_of_type(family, {}))


def test_quantised_experts_are_refused():
    """Stacked float8 weights come with scales that transformers' plain functions ignore."""
    model = tiny.tiny_model("olmoe")
    experts = find_experts(model)[0].module
    stacked = experts.get_parameter("down_proj")
    experts.down_proj = torch.nn.Parameter(stacked.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        find_experts(model)


def test_expert_parallel_experts_are_refused():
    """Ids beyond the local experts belong to other devices there."""
    model = tiny.tiny_model("olmoe")
    find_experts(model)[1].module._is_expert_parallel = True
    with pytest.raises(UnsupportedModelError, match="split over devices"):
        find_experts(model)
