"""Published hyperparameters of four models, stated here once more, and a way to run the command."""

import json

import pytest
from transformers import MixtralConfig, OlmoeConfig, PhimoeConfig, Qwen3MoeConfig


def shaped(family, vocabulary, hidden, expert, layers, heads, key_heads, top_k, **own):
    """A config of *family* by the numbers that all families have; *own* names the others."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": expert,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "num_experts_per_tok": top_k,
        "tie_word_embeddings": False,
    }
    return family(**sizes | own)


# From each repository's config.json, written down apart from what ships with the package.
PUBLISHED = {
    "OLMoE-1B-7B": shaped(
        OlmoeConfig, 50304, 2048, 1024, 16, 16, 16, 8, num_experts=64, max_position_embeddings=4096
    ),
    "Qwen3-30B-A3B": shaped(
        Qwen3MoeConfig, 151936, 2048, 6144, 48, 32, 4, 8, num_experts=128, head_dim=128,
        moe_intermediate_size=768, max_position_embeddings=40960,
    ),
    "Phi-3.5-MoE": shaped(
        PhimoeConfig, 32064, 4096, 6400, 32, 32, 8, 2, num_local_experts=16, attention_bias=True,
        lm_head_bias=True,
    ),
    "Mixtral-8x7B": shaped(
        MixtralConfig, 32000, 4096, 14336, 32, 32, 8, 2, num_local_experts=8
    ),
}  # fmt: skip
ARCHITECTURES = {
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phimoe": "PhimoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def write_config(path, config, **changes):
    """A bare config.json in bfloat16, nothing beside it."""
    raw = config.to_dict() | {"dtype": "bfloat16"} | changes
    raw.setdefault("architectures", None)
    if raw["architectures"] is None:
        raw["architectures"] = [ARCHITECTURES[config.model_type]]
    path.mkdir(parents=True, exist_ok=True)
    file = path / "config.json"
    file.write_text(json.dumps(raw))
    return file


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Label -> path of its config.json."""
    root = tmp_path_factory.mktemp("published")
    return {label: write_config(root / label, config) for label, config in PUBLISHED.items()}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """An OLMoE of 2 layers of 8 experts, top-2; one expert is 3 x 16 x 8 x 2 = 768 bytes."""
    config = shaped(
        OlmoeConfig, 100, 16, 8, 2, 2, 2, 2, num_experts=8, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return write_config(tmp_path_factory.mktemp("small"), config)
