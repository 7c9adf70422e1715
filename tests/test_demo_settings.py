"""What the demo promises about its own fairness, without running it."""

import json

import pytest

from melinoe.checkpoint import describe
from melinoe.demo import DemoSettings, held_out
from melinoe.shipped import GSM8K_TEST, HERE, TINY_OLMOE


def test_the_emulated_transfer_lasts_as_long_as_olmoes_over_pcie_4():
    """The demo's expert, 3 x 128 x 96 float32, and OLMoE's, 3 x 2048 x 1024 bfloat16 at 25 GB/s."""
    config = json.loads((TINY_OLMOE / "config.json").read_text())
    ours = 3 * config["hidden_size"] * config["intermediate_size"] * 4
    theirs_s = 3 * 2048 * 1024 * 2 / 25e9
    assert ours / DemoSettings().link_bytes_per_s == pytest.approx(theirs_s, rel=0.01)


def test_held_out_examples_are_none_that_chose_the_settings():
    """The first 64 rows of the test part chose the settings; the demo starts behind them."""
    settings = DemoSettings()
    lines = GSM8K_TEST.read_text(encoding="utf-8").splitlines()
    examples = held_out(settings, settings.eval_examples)
    assert len(examples) == settings.eval_examples
    rows = [int(example.source.rpartition(":")[2]) for example in examples]
    assert min(rows) > 64
    assert json.loads(lines[rows[0] - 1])["question"] in examples[0].prompt


def test_the_predictors_prompts_are_behind_those_trained_on():
    """There are enough of them."""
    settings = DemoSettings()
    rows = (HERE / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").count("\n")
    assert settings.train_examples + settings.predictor_prompts <= rows


def test_a_quarter_of_the_shipped_experts_is_eight():
    """32 experts a layer, top-4: 8 slots hold two tokens' choices."""
    about = describe(str(TINY_OLMOE))
    assert (about.num_experts, about.top_k, DemoSettings().slots) == (32, 4, 0.25)
