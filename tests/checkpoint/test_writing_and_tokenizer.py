"""What is written loads again under the hub's names; a tokenizer must fit the model beside it."""

import json
import os
import stat

import damaged
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

import melinoe
from melinoe.checkpoint import (
    check_output,
    describe,
    load_model,
    load_tokenizer,
    open_checkpoint,
    read_metadata,
    write_metadata,
    write_model,
)
from melinoe.checkpoint.writing import check_rewritable
from melinoe.errors import (
    AttachError,
    CheckpointError,
    OutputExistsError,
    TokenizerError,
    UnsupportedModelError,
)


@pytest.fixture
def olmoe(tmp_path):
    return damaged.write_olmoe(tmp_path / "olmoe")


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{number}": number for number in range(size)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", eos_token="w1")


def model_of(path):
    """The whole model of a directory."""
    with open_checkpoint(str(path)) as checkpoint:
        return load_model(checkpoint)


ROUTER = "model.layers.1.mlp.gate.weight"


def test_a_written_model_is_a_copy_of_its_base_but_for_what_changed(olmoe, tmp_path, caplog):
    """Shards, index, config and all else byte for byte; a router's own bytes; melinoe.json."""
    tokenizer_of(64).save_pretrained(olmoe)
    for name in ("LICENSE", "README.md", "chat_template.jinja", "custom.py"):
        (olmoe / name).write_text(f"the base's {name}")
    (olmoe / "consolidated.safetensors").write_bytes(b"other weights")
    (olmoe / "original").mkdir()
    (olmoe / "original" / "params.json").write_text("{}")
    model = model_of(olmoe)
    model.get_parameter(ROUTER).data.add_(1)
    out = tmp_path / "deep" / "out"
    write_model(model, str(olmoe), out, {"origin": "a test", "capacity": 0.25}, [ROUTER])
    recorded = read_metadata(out)
    files = recorded.pop("files").keys()
    assert recorded == {"origin": "a test", "capacity": 0.25}
    assert "consolidated.safetensors, original" in caplog.text
    renamed = {"README.md": "BASE_README.md"}
    changed = damaged.shard_with(olmoe, ROUTER).name
    for path in (path for path in olmoe.iterdir() if path.is_file()):
        if path.name not in ("consolidated.safetensors", changed):
            copy = out / renamed.get(path.name, path.name)
            assert copy.read_bytes() == path.read_bytes(), path.name
    kept = {path.name for path in olmoe.iterdir()} - {"consolidated.safetensors", "original"}
    written = {path.name for path in out.iterdir()}
    assert written == kept - {"README.md"} | {"BASE_README.md", "melinoe.json"}
    assert files == written - {"melinoe.json"}
    again = OlmoeForCausalLM.from_pretrained(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert not torch.equal(again.get_parameter(ROUTER), model_of(olmoe).get_parameter(ROUTER))
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    config = open_checkpoint(str(out)).config
    assert len(load_tokenizer(str(out), config)) == 64


def test_a_base_that_stores_a_parameter_under_other_names_is_refused(tmp_path, monkeypatch):
    """Asked before any training: where the way back does not lead to what is stored."""
    family = "inkling2"  # whose experts a rule interleaves
    tiny.tiny_model(family).save_pretrained(tmp_path)
    monkeypatch.setattr("melinoe.checkpoint.writing.revert_weight_conversion", lambda _, own: own)
    with open_checkpoint(str(tmp_path)) as checkpoint:
        model = load_model(checkpoint)
        with pytest.raises(UnsupportedModelError, match=r"gate_up_proj of inkling2.* cannot be"):
            check_rewritable(model, checkpoint)


def test_a_tensor_that_is_not_stored_cannot_have_changed(olmoe, tmp_path):
    """An embedding that serves as head is stored once, and written under that name."""
    tied = damaged.write_olmoe(tmp_path / "tied", tie_word_embeddings=True)
    model = model_of(tied)
    model.get_parameter("lm_head.weight").data.add_(1)
    write_model(model, str(tied), tmp_path / "out", {}, ["lm_head.weight"])
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    model.register_parameter("extra", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(UnsupportedModelError, match="stores nothing for extra"):
        write_model(model, str(tied), tmp_path / "out2", {}, ["extra"])
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_files_and_directories_have_the_mode_that_the_umask_gives(olmoe, tmp_path, mask):
    """As any program's: shared with the group, or kept from everybody."""
    model, before = model_of(olmoe), os.umask(mask)
    try:
        write_model(model, str(olmoe), tmp_path / "out", {}, [ROUTER])
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_a_taken_place_is_left_as_it_is(olmoe, tmp_path):
    """A directory with a file in it, and a file: refused, and nothing beside them."""
    model = model_of(olmoe)
    (tmp_path / "out").mkdir()
    assert check_output(tmp_path / "out") == tmp_path / "out"
    (tmp_path / "out" / "mine").write_text("keep")
    before = sorted(tmp_path.rglob("*"))
    for place in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(OutputExistsError, match="choose another place"):
            write_model(model, str(olmoe), place, {}, [])
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_half_written_is_left(olmoe, tmp_path):
    """Metadata that JSON cannot hold fails after the weights were written: they are gone."""
    model = model_of(olmoe)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_model(model, str(olmoe), tmp_path / "out", {"loss": float("nan")}, [])
    assert [p.name for p in tmp_path.iterdir()] == ["olmoe"]


def test_an_offloaded_model_is_not_written(olmoe, tmp_path):
    """Its experts are elsewhere; a checkpoint without them must not come to be."""
    model, _ = melinoe.load(olmoe, slots=2)
    with pytest.raises(AttachError, match="detach"):
        write_model(model, str(olmoe), tmp_path / "out", {}, [])
    assert not (tmp_path / "out").exists()


def test_metadata_is_replaced_whole(tmp_path):
    """A second write takes the place of the first; one that fails leaves it."""
    assert read_metadata(tmp_path) == {}
    write_metadata(tmp_path, {"a": 1})
    write_metadata(tmp_path, {"b": 2})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_metadata(tmp_path, {"c": float("inf")})
    assert read_metadata(tmp_path) == {"b": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["melinoe.json"]
    (tmp_path / "melinoe.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_metadata(tmp_path)


def test_the_tokenizer_of_another_model_is_refused(olmoe):
    """65 words for 64 rows: an id without an embedding. 60 words fit a padded embedding."""
    config = open_checkpoint(str(olmoe)).config
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        load_tokenizer(str(olmoe), config)
    tokenizer_of(65).save_pretrained(olmoe)
    with pytest.raises(TokenizerError, match="ids up to 64 and the model has 64 rows"):
        load_tokenizer(str(olmoe), config)
    tokenizer_of(60).save_pretrained(olmoe)
    assert len(load_tokenizer(str(olmoe), config)) == 60
    config.eos_token_id = 62
    with pytest.raises(TokenizerError, match="eos token 62 is not in the tokenizer"):
        load_tokenizer(str(olmoe), config)
    (olmoe / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(str(olmoe), config)


def test_a_description_counts_by_hand(olmoe):
    """2 layers x 4 experts x 3 matrices of 16 x 8 float32; with and without the weights."""
    found = describe(str(olmoe))
    assert (found.supported, found.weights, found.model_type) == (True, True, "olmoe")
    assert (found.moe_layers, found.num_experts, found.top_k) == (2, 4, 2)
    assert found.bytes_per_expert == 3 * 16 * 8 * 4
    assert found.expert_bytes == 2 * 4 * found.bytes_per_expert
    whole = sum(p.numel() * 4 for p in OlmoeForCausalLM.from_pretrained(olmoe).parameters())
    assert found.backbone_bytes == whole - found.expert_bytes
    for file in olmoe.glob("model*"):
        file.unlink()
    bare = describe(str(olmoe))
    assert (bare.supported, bare.weights) == (True, False)
    assert bare.expert_bytes == found.expert_bytes
    json.dumps(bare.to_dict())


def test_a_description_says_why_not(olmoe):
    """A torn shard, and a quantised config: not supported, with the sentence that loading gives."""
    shard = next(olmoe.glob("*.safetensors"))
    shard.write_bytes(b"")
    found = describe(str(olmoe))
    assert not found.supported and "is torn" in found.reason and found.moe_layers == 2
    damaged.edit_json(
        olmoe / "config.json", lambda c: c.update(quantization_config={"quant_method": "hqq"})
    )
    found = describe(str(olmoe))
    assert not found.supported and "quantised (hqq)" in found.reason
    assert found.model_type == "olmoe"
