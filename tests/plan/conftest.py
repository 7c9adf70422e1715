"""Published hyperparameters of four models, stated here once more, and a way to run the command."""

import json
import sys

import pytest
from transformers import MixtralConfig, OlmoeConfig, PhimoeConfig, Qwen3MoeConfig

from melinoe.cli import app as cli

# From each repository's config.json, written down apart from what ships with the package.
PUBLISHED = {
    "OLMoE-1B-7B": OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    ),
    "Phi-3.5-MoE": PhimoeConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=6400,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=16,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        tie_word_embeddings=False,
    ),
    "Mixtral-8x7B": MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    ),
}
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
    config = OlmoeConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return write_config(tmp_path_factory.mktemp("small"), config)


@pytest.fixture
def melinoe(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["melinoe", *map(str, arguments)])
        monkeypatch.delenv("MELINOE_DEBUG", raising=False)
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
