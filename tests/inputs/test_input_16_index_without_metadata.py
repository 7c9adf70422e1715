"""Sharded checkpoints whose index is unusual are trained from, like those that generate reads."""

import json

import damaged
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_olmoe import words_tokenizer

from melinoe.checkpoint import load_model, open_checkpoint
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.finetune import finetune

INDEX = "model.safetensors.index.json"


def tuned(base, out):
    settings = FinetuneSettings(capacity=0.5, steps=1, batch_size=1, lora_rank=2, learning_rate=0.1)
    finetune(base, [Example("w3 w4", " w5 w6 w7", "here")], out, settings)
    return out


def one_file(base, changed=None):
    """The shards' tensors in one file beside them, with one of them changed."""
    tensors = {}
    for shard in base.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    if changed:
        tensors[changed] = tensors[changed] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return tensors


CHANGES = {
    "no metadata": lambda index: index.pop("metadata"),
    "a wrong size": lambda index: index.update(metadata={"total_size": 3}),
    "a size that is no number": lambda index: index.update(metadata={"total_size": "all"}),
    "metadata of null": lambda index: index.update(metadata=None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_is_read_for_its_map_alone(change, tmp_path):
    """finetune reads it as generate does, and the output has the base's index and shards."""
    base = damaged.write_olmoe(tmp_path / "base")
    words_tokenizer().save_pretrained(base)
    damaged.edit_json(base / INDEX, CHANGES[change])
    out = tuned(base, tmp_path / "out")
    assert (out / INDEX).read_bytes() == (base / INDEX).read_bytes()
    shards = {path.name for path in base.glob("*.safetensors")}
    assert {path.name for path in out.glob("*.safetensors")} == shards
    with open_checkpoint(str(out)) as checkpoint:
        load_model(checkpoint)


def test_one_file_beside_an_index_is_what_is_read_and_written(tmp_path, caplog):
    """As in transformers the single file wins; the shards are left out, and that is said."""
    base = damaged.write_olmoe(tmp_path / "base")
    words_tokenizer().save_pretrained(base)
    norm = "model.norm.weight"
    tensors = one_file(base, changed=norm)
    (base / "consolidated.safetensors").write_bytes(b"")
    with open_checkpoint(str(base)) as checkpoint:
        assert torch.equal(load_model(checkpoint).get_parameter(norm), tensors[norm])
    out = tuned(base, tmp_path / "out")
    assert {path.name for path in out.glob("*.safetensors*")} == {"model.safetensors"}
    assert torch.equal(load_file(out / "model.safetensors")[norm], tensors[norm])
    assert "left out of the copy" in caplog.text and "consolidated.safetensors" in caplog.text


def test_a_file_that_the_index_does_not_name_is_left_out(tmp_path, caplog):
    """What is in no map is in no model; it is named."""
    base = damaged.write_olmoe(tmp_path / "base")
    words_tokenizer().save_pretrained(base)
    save_file({"more": torch.ones(1)}, base / "extra.safetensors")
    out = tuned(base, tmp_path / "out")
    assert not (out / "extra.safetensors").exists() and "extra.safetensors" in caplog.text
    assert json.loads((out / INDEX).read_text())["weight_map"]
