"""
A config that gives each token more experts than a layer has: every command says so.

`melinoe doctor` passed it, and `generate` failed inside torch.
"""

import json

import damaged
import pytest
import tiny
import torch
from small_olmoe import words_tokenizer

import melinoe
from melinoe.checkpoint import describe
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import BudgetError, ModelError, UnsupportedModelError
from melinoe.finetune import finetune
from melinoe.moe.experts import find_experts

WORDS = r"each token 64 experts \(num_experts_per_tok\) of a layer that has 4"


@pytest.fixture
def base(tmp_path):
    made = damaged.write_olmoe(tmp_path / "base")
    words_tokenizer().save_pretrained(made)
    return made


def says(base, key, value):
    damaged.edit_json(base / "config.json", lambda config: config.update({key: value}))
    return str(base)


COMMANDS = {
    "doctor": ["doctor", "{base}"],
    "plan": ["plan", "{base}", "--gpu-memory", "8GiB"],
    "generate": ["generate", "{base}", "w3 w4", "--slots", "2"],
    "trace": ["trace", "{base}", "--data", "{data}", "--out", "{out}"],
    "bench": ["bench", "{base}", "--data", "{data}", "--slots", "2"],
    "evaluate": ["evaluate", "{base}", "--data", "{data}"],
    "finetune": ["finetune", "{base}", "--data", "{data}", "--out", "{out}"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it(command, base, tmp_path, melinoe):
    """64 of 4: exit 1, and nothing is written."""
    says(base, "num_experts_per_tok", 64)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "w3", "completion": " w4 w5"}) + "\n")
    out = tmp_path / "out"
    arguments = [part.format(base=base, data=data, out=out) for part in COMMANDS[command]]
    code, printed, said = melinoe(*arguments)
    text = " ".join((printed + said).split())
    assert code == 1, text
    assert "each token 64 experts (num_experts_per_tok) of a layer that has 4" in text
    assert "Traceback" not in text and not out.exists()


def test_python_calls_say_it(base, tmp_path):
    """`load`, `finetune`, `describe`; and `attach` to a model in memory."""
    name = says(base, "num_experts_per_tok", 64)
    with pytest.raises(ModelError, match=WORDS):
        melinoe.load(name, slots=2)
    with pytest.raises(ModelError, match=WORDS):
        finetune(name, [Example("w3", " w4", "here")], tmp_path / "out", FinetuneSettings())
    assert "64 experts" in describe(name).reason
    model = tiny.tiny_model("olmoe")
    model.config.num_experts_per_tok = 64
    with pytest.raises(UnsupportedModelError, match="64 experts"):
        melinoe.attach(model, slots=2)
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == tiny.NUM_EXPERTS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_per_tok", 5), ("num_experts_per_tok", 0), ("num_experts_per_tok", -1),
        ("num_experts_per_tok", 2.5), ("num_experts_per_tok", "2"), ("num_experts_per_tok", None),
        ("num_experts_per_tok", True),
        ("num_experts", 8), ("num_experts", 2), ("num_experts", 0), ("num_experts", -4),
        ("num_experts", "4"), ("num_experts", None),
    ],
)  # fmt: skip
def test_other_numbers_that_cannot_be_are_refused(base, key, value):
    """Too many by one, none, less than none, no whole number, or other than the files hold."""
    name = says(base, key, value)
    with pytest.raises(ModelError) as refusal:
        melinoe.load(name, slots=2)
    assert "\n" not in str(refusal.value)
    assert not describe(name).supported


def test_more_slots_than_experts_are_refused(base):
    """The config is right, the setting is not."""
    with pytest.raises(BudgetError, match="between 1 and 4"):
        melinoe.load(str(base), slots=5)


@pytest.mark.parametrize(
    ("groups", "kept", "fits"), [(4, 2, True), (2, 1, True), (4, 5, False), (3, 1, False),
                                 (8, 1, False), (2, 0, False)]
)  # fmt: skip
def test_groups_that_cannot_give_enough_experts_are_refused(groups, kept, fits):
    """Eight experts, two a token: what the groups kept can reach must be two or more."""
    with torch.device("meta"):
        model = tiny.tiny_model("deepseek_v3")
    model.config.n_group, model.config.topk_group = groups, kept
    if fits:
        assert find_experts(model)
    else:
        with pytest.raises(UnsupportedModelError, match="groups of experts"):
            find_experts(model)
