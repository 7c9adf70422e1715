"""A plan of a quantised model: sizes by its quantization_config, worked by hand."""

import json

import pytest
from typer.testing import CliRunner

from melinoe.cli.app import app
from melinoe.errors import CheckpointError
from melinoe.plan.facts import known_models, model_facts

GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "sliding_window": 128,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}


def written(path, config):
    path.write_text(json.dumps(config))
    return str(path)


def test_an_expert_of_gpt_oss_takes_what_its_blocks_do(tmp_path):
    """
    MXFP4: 17 bytes for 32 weights of 2880 x 5760 and 2880 x 2880; biases stay 16 bits.

    5760 x 90 x 17 + 2880 x 90 x 17 + 2 x (5760 + 2880) = 13,236,480 bytes. The rest is not packed:
    two tables of 201,088 x 2880; in each of 24 layers projections 2880 x 4096 (twice) and
    2880 x 512 (twice) with biases, 64 sinks, a router, two norms; and the last norm. In all the
    published checkpoint's 13.76 GB.
    """
    facts = model_facts(written(tmp_path / "config.json", GPT_OSS_20B))
    assert {layer.block_bytes for layer in facts.layers} == {13_236_480}
    layer = 2 * (2880 * 4096 + 2880 * 512) + 4096 + 2 * 512 + 2880 + 64 + 32 * 2881 + 2 * 2880
    assert facts.backbone_bytes == 2 * (2 * 201_088 * 2880 + 24 * layer + 2880)
    assert (facts.backbone_bytes + facts.expert_bytes) / 1e9 == pytest.approx(13.76, abs=0.01)
    assert facts.packed == "mxfp4, 4.25 bits a weight"


# Qwen3-30B-A3B: an expert is three matrices of 768 x 2048, gate and up with 768 outputs.
WEIGHTS = 768 * 2048
QWEN = {
    # 6 x 16 blocks of 128 x 128, 4 bytes each; also where the checkpoint has one scale for all.
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 3 * (WEIGHTS + 96 * 4)),
    "fp8 whole": ({"quant_method": "fp8"}, 3 * (WEIGHTS + 96 * 4)),
    # 2048 / 128 groups of 768 outputs, or 768 / 128 of 2048: 12,288 scales of 2 bytes, and zero
    # points of one.
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        3 * (WEIGHTS // 2 + 12_288 * 3),
    ),
    "gptq 8 bits": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1},
        3 * WEIGHTS + (768 + 768 + 2048) * 3,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
        3 * (WEIGHTS // 2 + 12_288 * 3),
    ),
    "w4a16": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head", "re:.*mlp.gate$"],
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "strategy": "group",
                        "group_size": 128,
                        "symmetric": True,
                    },
                }
            },
        },
        3 * (WEIGHTS // 2 + 12_288 * 2),
    ),
}


# Two of its 48 layers: every layer is alike, and each is built to be weighed.
QWEN_RAW = known_models()["Qwen3-30B-A3B"]["config"] | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same model, not quantised."""
    return model_facts(written(tmp_path_factory.mktemp("plain") / "config.json", QWEN_RAW), 64)


@pytest.mark.parametrize("form", QWEN)
def test_an_expert_of_qwen3_takes_its_codes_and_scales(form, plain, tmp_path):
    """What is no expert is decoded when it is loaded, and counted so."""
    config, expert = QWEN[form]
    path = written(tmp_path / "config.json", QWEN_RAW | {"quantization_config": config})
    facts = model_facts(path, 64)
    assert {layer.block_bytes for layer in facts.layers} == {expert}
    assert (facts.backbone_bytes, facts.read_bytes) == (plain.backbone_bytes, plain.read_bytes)
    assert facts.kv_bytes == plain.kv_bytes


def test_experts_that_a_config_leaves_out_are_not_packed(plain, tmp_path):
    """By a name, a glob or a pattern; leaving out the attention changes nothing."""
    for names, packed in (
        (["model.layers.*.self_attn"], True),
        (["mlp.experts"], False),
        (["model.layers.*.mlp"], False),
        (["re:.*experts.*"], False),
    ):
        config = QWEN["w4a16"][0] | {"ignore": ["lm_head", *names]}
        path = written(tmp_path / "config.json", QWEN_RAW | {"quantization_config": config})
        assert (model_facts(path, 64).expert_bytes < plain.expert_bytes) is packed


def test_a_plan_says_how_experts_are_packed(tmp_path):
    """Of a file and of a directory; by bits on request."""
    (tmp_path / "m").mkdir()
    path = written(tmp_path / "m" / "config.json", GPT_OSS_20B | {"num_hidden_layers": 2})
    for name in (path, str(tmp_path / "m")):
        done = CliRunner().invoke(app, ["plan", name, "--gpu-memory", "8GiB"])
        assert done.exit_code == 0
        assert "as they are stored (mxfp4, 4.25 bits a weight)" in done.stdout
        asked = ["plan", name, "--gpu-memory", "8GiB", "--bits", "4", "--json"]
        facts = json.loads(CliRunner().invoke(app, asked).stdout)["model"]
        assert facts["packed"] is None
        weights = 2880 * 5760 + 2880 * 2880 + 5760 + 2880
        assert facts["layers"][0]["block_bytes"] == round(weights * 4.5 / 8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "hqq"}, r"quantised \(hqq\).*--bits 8 or 4"),
        ({}, None),
        ({"bits": 4}, "unnamed kind.*--bits"),
        ({"quant_method": ["fp8"]}, "quantised.*--bits"),
        ("4 bits", "unnamed kind"),
        ({"quant_method": "gptq"}, "not readable.*bits.*--bits"),
        ({"quant_method": "gptq", "bits": 0}, "with 0 bits.*--bits"),
        ({"quant_method": "awq", "group_size": "all"}, "not readable"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "not readable"),
        ({"quant_method": "fp8", "modules_to_not_convert": [1]}, "not readable"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["re:("]}, "not readable"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes.*--bits"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "not readable"),
    ],
)
def test_a_form_that_is_not_known_is_refused_with_a_way(config, words, tmp_path):
    """Unless the bits are given, which plan its weights stored so."""
    raw = known_models()["OLMoE-1B-7B"]["config"] | {"num_hidden_layers": 1}
    path = written(tmp_path / "config.json", raw | {"quantization_config": config})
    if words is not None:
        with pytest.raises(CheckpointError, match=words):
            model_facts(path, 64)
    asked = ["plan", path, "--gpu-memory", "8GiB", "--bits", "8"]
    assert CliRunner().invoke(app, asked).exit_code == 0
