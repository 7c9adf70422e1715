"""What a config tells: bytes of keys and values, what a token reads, who is refused."""

import json

import pytest
import torch
from tiny import OVERRIDES, _model_class, families, tiny_config, tiny_of_type
from transformers import LlamaConfig

from melinoe.errors import CheckpointError, UnsupportedModelError
from melinoe.moe.experts import find_experts
from melinoe.moe.meta_pass import DIRECT, cache_bytes, forward
from melinoe.plan.facts import model_facts
from tests.plan.conftest import PUBLISHED, write_config

# Their code looks at values, or they keep no cache: then the heads are counted, or nothing claimed.
NO_PASS = {"diffusion_gemma", "glm5_next", "openai_privacy_filter", "qwen4_exp"}


def on_meta(family, **settings):
    """A tiny model of *family* without weights, and its MoE layers."""
    model_class = _model_class(family)
    config = tiny_config(model_class.config_class, OVERRIDES.get(family, {}) | settings)
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=torch.bfloat16).eval()
    return model, find_experts(model)


@pytest.mark.parametrize(
    ("label", "layers", "heads", "size", "context"),
    [
        ("OLMoE-1B-7B", 16, 16, 128, 100),
        # What is beyond is told from two lengths that are asked directly.
        ("OLMoE-1B-7B", 16, 16, 128, 10_000),
        ("Qwen3-30B-A3B", 48, 4, 128, 10_000),
        ("Mixtral-8x7B", 32, 8, 128, 10_000),
    ],
)
def test_keys_and_values_are_heads_times_size_times_tokens(
    label, layers, heads, size, context, published
):
    """Grouped heads, two bytes, key and value; also beyond where the cache is asked directly."""
    facts = model_facts(str(published[label]), context=context)
    assert facts.kv_bytes == 2 * layers * heads * size * 2 * context


def test_latent_attention_keeps_the_latent_and_the_rotated_key():
    """DeepSeek-V3, tiny: 16 latent and 8 rotated values of two bytes, a token and layer."""
    model, layers = on_meta("deepseek_v3")
    assert cache_bytes(model, layers, 50) == 2 * (16 + 8) * 2 * 50


def test_a_sliding_window_stops_growing():
    """Mixtral with a window of 64 keeps 63 tokens between steps, however long the context."""
    model, layers = on_meta("mixtral", sliding_window=64)
    a_token = 2 * 2 * 4 * 8 * 2
    assert cache_bytes(model, layers, 40) == a_token * 40
    assert cache_bytes(model, layers, 1000) == a_token * 63
    assert cache_bytes(model, layers, 3 * DIRECT) == a_token * 63


def test_linear_attention_keeps_a_state_that_does_not_grow():
    """Of Qwen3-Next's two tiny layers only the full one grows: 4 heads of 8, key and value."""
    model, layers = on_meta("qwen3_next")
    at = [cache_bytes(model, layers, tokens) for tokens in (64, 128, 192)]
    assert at[1] - at[0] == at[2] - at[1] == 2 * 4 * 8 * 2 * 64
    assert at[0] > 2 * 4 * 8 * 2 * 64  # the state is there


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("olmoe", {}),
        ("gpt_oss", {}),  # windows in every other layer
        ("mixtral", {"sliding_window": 3000}),  # full between the two lengths that are asked
        ("mixtral", {"sliding_window": 6000}),  # full beyond both
        ("deepseek_v4", {}),  # windows and compressed blocks
        ("qwen3_next", {}),
    ],
)
def test_beyond_what_is_asked_the_cache_goes_on_as_a_pass_of_that_length_would(family, settings):
    """At twice the length that is asked directly, the continued line equals the real pass."""
    model, layers = on_meta(family, **settings)
    whole = sum(forward(model, layers, 2 * DIRECT).cache_bytes)
    assert cache_bytes(model, layers, 2 * DIRECT) == whole


@pytest.mark.parametrize("family", families())
def test_every_family_is_counted_from_its_config_alone(family, tmp_path):
    """Experts and backbone add up to all parameters; keys and values are told, or said unknown."""
    model, layers = on_meta(family)
    raw = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
    facts = model_facts(str(tmp_path / "config.json"), context=32)
    # Some family ties its experts in two stacks: they are one parameter, and two stores.
    own = {id(p): p.nbytes for layer in layers for p in layer.module.parameters(recurse=False)}
    assert facts.backbone_bytes == sum(p.nbytes for p in model.parameters()) - sum(own.values())
    assert facts.expert_bytes == sum(layer.num_experts * layer.block_bytes for layer in layers)
    assert 0 < facts.read_bytes <= facts.backbone_bytes
    if family not in NO_PASS:
        assert facts.kv_bytes is not None and facts.kv_bytes > 0
        assert "own cache" in facts.kv_source
    else:
        assert facts.kv_bytes is None and facts.kv_source.startswith("not known")


def test_the_meta_pass_keeps_what_a_real_one_keeps():
    """Bytes in the cache of a real forward pass on the CPU equal those of one without weights."""
    from tiny import tiny_model

    for family in ("olmoe", "deepseek_v3", "qwen3_next", "gpt_oss"):
        real = tiny_model(family, dtype=torch.float32)
        with torch.no_grad():
            kept = real(
                input_ids=torch.ones(1, 20, dtype=torch.long), use_cache=True
            ).past_key_values
        tensors = {}
        for layer in kept.layers:
            for key in ("keys", "values"):
                if isinstance(getattr(layer, key, None), torch.Tensor):
                    tensors[id(layer), key] = getattr(layer, key)
            for key in ("conv_states", "recurrent_states"):
                states = getattr(layer, key, None) or ()
                states = states.values() if isinstance(states, dict) else states
                for number, state in enumerate(s for s in states if s is not None):
                    tensors[id(layer), key, number] = state
        by_hand = sum(t.numel() * t.element_size() for t in tensors.values())
        with torch.device("meta"):
            model = type(real)._from_config(real.config, dtype=torch.float32).eval()
        assert cache_bytes(model, find_experts(model), 20) == by_hand, family


def test_a_tied_table_is_read_because_it_is_the_head(tmp_path):
    """Untied, a token takes one row of the table; tied, the head multiplies by all of it."""
    config = PUBLISHED["OLMoE-1B-7B"]
    tied = write_config(tmp_path, config, tie_word_embeddings=True)
    facts = model_facts(str(tied), context=1)
    assert facts.read_bytes == facts.backbone_bytes


def test_parts_for_images_are_weighed_but_not_read():
    """Qwen3-VL's vision tower takes memory, and takes no part in a text token's pass."""
    model, layers = on_meta("qwen3_vl_moe")
    tower = sum(p.numel() * 2 for n, p in model.named_parameters() if "visual" in n)
    seen = forward(model, layers, 4)
    own = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    others = sum(p.numel() * 2 for p in model.parameters() if id(p) not in own)
    assert tower > 0
    assert others - seen.read_bytes - seen.looked_up_bytes == tower


def test_the_pass_leaves_the_model_as_it_was():
    """Afterwards no experts function is bound, and the model chooses what it chose before."""
    model, layers = on_meta("olmoe")
    before = model.config._experts_implementation
    forward(model, layers, 3)
    forward(model, layers, 3)  # a second bind would be refused
    assert model.config._experts_implementation == before


def test_a_dense_model_is_refused(tmp_path):
    """Llama has nothing to offload, and the sentence says so."""
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=32)  # fmt: skip
    file = write_config(tmp_path, config, architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="no mixture-of-experts layers"):
        model_facts(str(file))


@pytest.mark.parametrize("family", ["jetmoe", "doge"])
def test_an_undecorated_family_is_refused_by_name(family, tmp_path):
    """Its experts exist, but no registered function can compute them."""
    model = tiny_of_type(family, {})
    raw = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (tmp_path / "config.json").write_text(json.dumps(raw, default=str))
    with pytest.raises(UnsupportedModelError, match=family):
        model_facts(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "readable"),
        ("[]", "readable"),
        ('{"hidden_size": 3}', "model_type"),
        ('{"model_type": "no_such_family"}', "no_such_family"),
        ('{"model_type": "olmoe", "quantization_config": {"quant_method": "hqq"}}', "hqq"),
        ('{"model_type": "olmoe", "hidden_size": "wide"}', "olmoe"),
        ('{"model_type": "olmoe", "num_attention_heads": 0}', "Olmoe"),
    ],
)
def test_a_config_that_is_none_is_refused_in_a_sentence(content, words, tmp_path):
    """Broken JSON, no object, no family, an unknown one, an unknown packing, impossible values."""
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=words):
        model_facts(str(file))
