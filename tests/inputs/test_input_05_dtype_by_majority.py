"""The type of weights that no config names is that of most of their bytes, for every command."""

import json

import damaged
import pytest
import torch
from small_olmoe import words_tokenizer
from typer.testing import CliRunner

import melinoe
from melinoe.checkpoint import describe, load_model, open_checkpoint
from melinoe.cli.app import app
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.finetune import finetune
from melinoe.plan.facts import model_facts

FIRST_NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def mixed(tmp_path):
    """All of it in bfloat16 but one norm, which a program meets first; no type in the config."""
    base = damaged.write_olmoe(tmp_path / "mixed", dtype=torch.bfloat16)
    words_tokenizer().save_pretrained(base)
    damaged.rewrite(
        damaged.shard_with(base, FIRST_NORM),
        lambda t: t.update({FIRST_NORM: t[FIRST_NORM].float()}),
    )
    damaged.edit_json(base / "config.json", lambda config: config.pop("dtype"))
    return base


def test_one_tensor_in_float32_does_not_double_every_budget(mixed, tmp_path, caplog):
    """Opened, described, planned, loaded and trained: bfloat16 everywhere, and a word of it."""
    with open_checkpoint(str(mixed)) as checkpoint:
        assert checkpoint.dtype == torch.bfloat16
        assert load_model(checkpoint).dtype == torch.bfloat16
    assert "names no type; its weights are taken as bfloat16" in caplog.text
    about, facts = describe(str(mixed)), model_facts(str(mixed))
    assert about.dtype == facts.dtype == "bfloat16"
    assert about.expert_bytes == facts.expert_bytes == 2 * 4 * 3 * 16 * 8 * 2
    model, _ = melinoe.load(mixed, slots=2)
    assert model.get_parameter(FIRST_NORM).dtype == torch.bfloat16
    shown = CliRunner().invoke(app, ["doctor", str(mixed), "--json"])
    assert json.loads(shown.stdout)["dtype"] == "bfloat16"
    settings = FinetuneSettings(capacity=0.5, steps=1, batch_size=1, lora_rank=2)
    finetune(mixed, [Example("w3 w4", " w5 w6 w7", "here")], tmp_path / "out", settings)
    for name, place in open_checkpoint(str(tmp_path / "out")).files.items():
        assert place.info.dtype == (torch.float32 if name == FIRST_NORM else torch.bfloat16)


def test_the_older_word_for_a_type_is_read_and_kept(mixed):
    """``torch_dtype``, as transformers wrote it before its fifth version."""
    damaged.edit_json(mixed / "config.json", lambda config: config.update(torch_dtype="float16"))
    with open_checkpoint(str(mixed)) as checkpoint:
        assert checkpoint.dtype == torch.float16
    assert describe(str(mixed)).dtype == model_facts(str(mixed)).dtype == "float16"


def test_a_config_that_doubles_what_is_stored_is_believed_and_named(mixed, caplog):
    """transformers loads what the config says; whoever pays for it is told how not to."""
    damaged.edit_json(mixed / "config.json", lambda config: config.update(dtype="float32"))
    with open_checkpoint(str(mixed)) as checkpoint:
        assert checkpoint.dtype == torch.float32
    assert "loaded as float32, for config.json says so" in caplog.text
    assert 'set "dtype" there to "bfloat16"' in caplog.text


def test_only_types_that_weights_are_computed_in_can_be_asked_for(mixed):
    """Eight bits mean nothing without scales, though torch calls them floating-point."""
    for odd in ("float8_e4m3fn", "int8", "nonsense", torch.float8_e5m2, None, 3):
        with pytest.raises(ValueError, match="dtype must be 'auto' or one of float32, bfloat16"):
            open_checkpoint(str(mixed), odd)
