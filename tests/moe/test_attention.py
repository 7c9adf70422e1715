"""Attention projections are found in every family, by looking."""

import logging

import pytest
import tiny
import torch
from torch import nn

from melinoe.errors import UnsupportedModelError
from melinoe.moe.attention import find_attention
from melinoe.moe.experts import find_experts

FAMILIES = [family for family in tiny.families() if family not in tiny.CANNOT]


def names(model):
    return set(find_attention(model, find_experts(model)))


def test_olmoes_are_the_four_of_each_layer():
    """Queries, keys, values, outputs; two layers."""
    expected = {
        f"model.layers.{layer}.self_attn.{one}_proj" for layer in range(2) for one in "qkvo"
    }
    assert names(tiny.tiny_model("olmoe")) == expected


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_but_attention_is_found_in_any_family(family):
    """Projections of queries and outputs are found; no MLP, expert or router is."""
    model = tiny.tiny_model(family)
    found = names(model)
    assert found
    for name in found:
        parts = name.split(".")
        assert not {"mlp", "experts", "gate", "router", "feed_forward", "shared_mlp"} & set(parts)
        assert "visual" not in parts and "audio_tower" not in parts
    decoders = {layer.name.rsplit(".layers.", 1)[0] for layer in find_experts(model)}
    for name, module in model.named_modules():
        ours = any(name.startswith(f"{one}.") or one.startswith("layers.") for one in decoders)
        if ours and type(module) is nn.Linear and name.split(".")[-1] in ("q_proj", "o_proj"):
            assert name in found or "attn" not in name, name


def test_layers_with_another_mixer_are_named_once(caplog):
    """LFM2 has a short convolution in one layer of two."""
    with caplog.at_level(logging.WARNING, logger="melinoe"):
        assert names(tiny.tiny_model("lfm2_moe"))
    (record,) = caplog.records
    assert "Lfm2MoeShortConv" in record.getMessage()


def test_dense_layers_before_the_first_experts_count_too():
    """DeepSeek-V3's first layer is dense here, and its attention is found."""
    model = tiny.tiny_model("deepseek_v3")
    assert {layer.name for layer in find_experts(model)} == {"model.layers.1.mlp.experts"}
    assert "model.layers.0.self_attn.o_proj" in names(model)


def test_a_model_without_attention_is_refused():
    """One sentence, and what can be trained instead."""
    model = tiny.tiny_model("olmoe")
    for layer in model.model.layers:
        layer.self_attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"no attention projection.*alone"):
        find_attention(model, find_experts(model))


def test_a_linear_that_computes_otherwise_is_left_out_and_named(caplog):
    """A subclass may use its weight in its own way: no update of ours would fit."""

    class Grouped(nn.Linear):
        pass

    model = tiny.tiny_model("olmoe")
    with torch.device("meta"):
        model.model.layers[0].self_attn.o_proj = Grouped(4, 4)
    with caplog.at_level(logging.WARNING, logger="melinoe"):
        assert "model.layers.0.self_attn.o_proj" not in names(model)
    assert "Grouped" in caplog.text
