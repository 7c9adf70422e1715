"""What ships is what the card and the notices say."""

import json

import pytest
from safetensors import safe_open

from melinoe.data import load_examples
from melinoe.shipped import GSM8K_TEST, GSM8K_TRAIN, HELD_OUT, HERE, TINY_OLMOE

CONFIG = json.loads((TINY_OLMOE / "config.json").read_text())
TRAINING = json.loads((TINY_OLMOE / "training.json").read_text())


def test_the_model_is_small_and_in_the_hubs_layout():
    """At most 12 MB of bf16, one tensor per expert and projection."""
    path = TINY_OLMOE / "model.safetensors"
    assert path.stat().st_size <= 12_000_000
    with safe_open(path, framework="pt") as tensors:
        names = set(tensors.keys())
        assert {tensors.get_slice(name).get_dtype() for name in names} == {"BF16"}
    experts, layers = CONFIG["num_experts"], CONFIG["num_hidden_layers"]
    assert experts >= 32 and CONFIG["num_experts_per_tok"] >= 4 and layers >= 4
    assert {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    } <= names


def test_the_model_was_trained_as_its_card_says():
    """At least 30 M tokens, with load balancing; every corpus's perplexity stands on the card."""
    assert TRAINING["tokens_seen"] >= 30_000_000
    assert TRAINING["settings"]["balance"] > 0
    card = (TINY_OLMOE / "README.md").read_text()
    for corpus, row in TRAINING["validation"].items():
        assert f"| {corpus} | {row['perplexity']:.2f} |" in card
    losses = [row["loss"] for row in TRAINING["log"] if "loss" in row]
    assert losses[-1] < losses[0] / 2


def test_gsm8k_is_whole():
    """7,473 questions to train on and 1,319 to test on, none in both."""
    train, test = load_examples(GSM8K_TRAIN), load_examples(GSM8K_TEST)
    assert (len(train), len(test)) == (7473, 1319)
    assert not {e.prompt for e in train} & {e.prompt for e in test}


@pytest.mark.parametrize("corpus", sorted(TRAINING["validation"]))
def test_every_corpus_has_held_out_text(corpus):
    """One file a corpus that the model was trained on."""
    assert len(load_examples(HELD_OUT / f"{corpus}.jsonl")) >= 16


def test_the_notice_names_everything_that_ships():
    """No file without terms."""
    notice = (HERE / "NOTICE.md").read_text()
    for path in HERE.iterdir():
        if path.is_dir() and path.name not in ("held_out", "__pycache__"):
            assert f"`{path.name}/`" in notice
    for path in HELD_OUT.iterdir():
        assert f"`held_out/{path.name}`" in notice
