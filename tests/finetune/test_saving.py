"""From an adapter to a plain checkpoint: bit for bit what fine-tuning itself would have merged."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from melinoe.checkpoint import read_metadata, write_metadata
from melinoe.cli.app import app
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import CheckpointError, MelinoeError, OutputExistsError
from melinoe.finetune import finetune
from melinoe.finetune.adapter import CONFIG, WEIGHTS
from melinoe.finetune.saving import merge_adapter
from melinoe.moe.routing import fingerprint
from melinoe.report.card import write_card

LETTERS = "abcdefghijklmnopqrstuvwxyz .?"
DATA = [Example("what? ", f"{word} is it.", "here") for word in ("a", "the", "an")]


def write_base(place, **settings):
    """A tiny OLMoE in bfloat16 with a tokenizer of single letters."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i for i, c in enumerate(LETTERS, 3)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tiny_model("olmoe", dtype=torch.bfloat16, **settings).save_pretrained(place)
    tokenizer.save_pretrained(place)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, and what one run on it leaves with each way of saving."""
    place = tmp_path_factory.mktemp("saved")
    write_base(place / "base")
    for save in ("merged", "adapter", "both"):
        settings = FinetuneSettings(
            lambda_replay=0.0,
            capacity=0.5,
            steps=2,
            batch_size=3,
            learning_rate=1e-2,
            lora_rank=2,
            save=save,
        )
        finetune(place / "base", DATA, place / save, settings)
    return place


def same_files(one, other):
    """Two checkpoints hold equal tensors under equal names."""
    a, b = (load_file(directory / "model.safetensors") for directory in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_merged_adapter_and_both_are_one_run(place, tmp_path):
    """The adapter of a run merges to the checkpoint of that run; the seed made all three equal."""
    metadata = merge_adapter(place / "adapter", tmp_path / "out")
    assert same_files(tmp_path / "out", place / "merged")
    assert same_files(place / "both", place / "merged")
    assert not same_files(place / "base", place / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert metadata["fingerprint"] == fingerprint(model) != metadata["base_fingerprint"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.7.down_proj.weight" in file.keys()  # noqa: SIM118


def test_each_directory_holds_what_was_asked_for(place, tmp_path):
    """No weights beside an adapter, no adapter in a plain checkpoint; melinoe.json everywhere."""
    names = {save: {p.name for p in (place / save).iterdir()} for save in ("merged", "adapter")}
    assert CONFIG not in names["merged"] and "model.safetensors" not in names["adapter"]
    assert {CONFIG, WEIGHTS, "melinoe.json", "tokenizer.json"} <= names["adapter"]
    assert {p.name for p in (place / "both" / "adapter").iterdir()} >= {CONFIG, WEIGHTS}
    merge_adapter(place / "both" / "adapter", tmp_path / "out")
    before, after = read_metadata(place / "adapter"), read_metadata(tmp_path / "out")
    assert after["settings"]["capacity"] == 0.5 and after["log"]
    assert {k: v for k, v in after.items() if k in ("base", "data", "fingerprint")} == {
        k: v for k, v in before.items() if k in ("base", "data", "fingerprint")
    }


def test_another_base_is_refused(place, tmp_path):
    """By its routers, where the shapes would fit; nothing is written."""
    write_base(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"trained on another model.*--base"):
        merge_adapter(place / "adapter", tmp_path / "out", base=tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_adapter_of_unknown_origin_is_checked_by_its_shapes(place, tmp_path):
    """PEFT writes no melinoe.json: its adapter merges into a base whose shapes are due."""
    adapter = tmp_path / "pefts"
    adapter.mkdir()
    for name in (CONFIG, WEIGHTS):
        (adapter / name).write_bytes((place / "adapter" / name).read_bytes())
    merge_adapter(adapter, tmp_path / "out", base=place / "base")
    assert same_files(tmp_path / "out", place / "merged")
    write_base(tmp_path / "wide", hidden_size=64)
    with pytest.raises(CheckpointError, match="does not fit"):
        merge_adapter(adapter, tmp_path / "out2", base=tmp_path / "wide")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="give --base"):
        merge_adapter(adapter, tmp_path / "out2")


def test_a_taken_output_and_a_missing_base_stop_at_once(place, tmp_path):
    """What was there stays."""
    with pytest.raises(OutputExistsError, match="not empty"):
        merge_adapter(place / "adapter", place / "merged")
    with pytest.raises(MelinoeError):
        merge_adapter(place / "adapter", tmp_path / "out", base=tmp_path / "absent")
    assert not any(tmp_path.iterdir())


def test_the_base_is_found_by_its_path_where_the_record_keeps_its_name_alone(place, tmp_path):
    """The command line writes no path into melinoe.json; PEFT's file has it, until it moves."""
    adapter = tmp_path / "adapter"
    shutil.copytree(place / "adapter", adapter)
    write_metadata(adapter, read_metadata(adapter) | {"base": "base"})
    merged = merge_adapter(adapter, tmp_path / "out")
    assert same_files(tmp_path / "out", place / "merged") and merged["base"] == "base"
    config = json.loads((adapter / CONFIG).read_text())
    moved = config | {"base_model_name_or_path": str(tmp_path / "moved" / "base")}
    (adapter / CONFIG).write_text(json.dumps(moved))
    with pytest.raises(CheckpointError, match=r"base that .* names cannot be opened .*--base"):
        merge_adapter(adapter, tmp_path / "out2")
    merged = merge_adapter(adapter, tmp_path / "out2", base=place / "base")
    assert same_files(tmp_path / "out2", place / "merged") and merged["base"] == "base"


def test_an_adapter_finds_its_base_from_every_directory(place, tmp_path, monkeypatch):
    """The base was typed as a relative name; what is kept is where it is."""
    monkeypatch.chdir(place)
    settings = FinetuneSettings(
        capacity=0.5, steps=1, batch_size=3, learning_rate=1e-2, lora_rank=2, save="adapter"
    )
    finetune("base", DATA, tmp_path / "adapter", settings)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str((place / "base").resolve())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1 and modes != {0o600}  # what the umask gives, weights like the rest
    assert (tmp_path / "adapter" / "tokenizer.json").read_bytes() == (
        place / "base" / "tokenizer.json"
    ).read_bytes()
    monkeypatch.chdir(tmp_path)
    merge_adapter(tmp_path / "adapter", tmp_path / "out")


def test_the_command_merges_and_fails_in_one_sentence(place, tmp_path):
    """Exit 0 with a checkpoint and its card; an error of ours for what is no adapter."""
    done = CliRunner().invoke(app, ["merge", str(place / "adapter"), "--out", str(tmp_path / "o")])
    assert done.exit_code == 0, done.output
    assert same_files(tmp_path / "o", place / "merged")
    assert "library_name: transformers" in (tmp_path / "o" / "README.md").read_text()
    failed = CliRunner().invoke(app, ["merge", str(place / "base"), "--out", str(tmp_path / "p")])
    assert isinstance(failed.exception, CheckpointError)
    assert "holds no adapter" in str(failed.exception)


def test_the_card_of_an_adapter_says_how_it_is_merged_and_loaded(place, tmp_path):
    """Not that it runs by itself; with both saved the card is that of the checkpoint."""
    shutil.copytree(place / "adapter", tmp_path / "alone")
    shutil.copytree(place / "both", tmp_path / "both")
    cards = []
    for name in ("alone", "both"):
        write_card(tmp_path / name)
        cards.append((tmp_path / name / "README.md").read_text())
    alone, both = cards
    assert "library_name: peft" in alone and "library_name: transformers" in both
    assert "melinoe merge ADAPTER" in alone and "PeftModel.from_pretrained" in alone
    assert "melinoe.load(" not in alone and "melinoe.load(" in both
