"""Each kind of damage is refused with one sentence that names the file and the way out."""

import json
import re

import damaged
import pytest
import torch

from melinoe.checkpoint import load_backbone, open_checkpoint
from melinoe.errors import CheckpointError, MelinoeError, UnsupportedModelError

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def olmoe(tmp_path):
    return damaged.write_olmoe(tmp_path / "olmoe")


def refuse(path, message, error: type[MelinoeError] = CheckpointError):
    """Opening and loading the backbone ends in one sentence that matches *message*."""
    with pytest.raises(error, match=message) as caught, open_checkpoint(str(path)) as checkpoint:
        load_backbone(checkpoint)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert re.search(
        r"; .*(?:download|use|give|convert|of another model|do not belong|check)", str(caught.value)
    )


def test_the_whole_checkpoint_opens(olmoe):
    """The control: undamaged, it has several shards and opens."""
    assert len(list(olmoe.glob("*.safetensors"))) > 2
    with open_checkpoint(str(olmoe)) as checkpoint:
        assert [source.num_experts for source in checkpoint.experts] == [4, 4]
        assert checkpoint.expert_bytes == 2 * 4 * 3 * 16 * 8 * 4


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_torn_shard_is_refused(olmoe, keep):
    """Empty, cut in its length, cut in its header, cut by one byte: named, with its sizes."""
    shard = damaged.shard_with(olmoe, EXPERT)
    shard.write_bytes(shard.read_bytes()[:keep])
    refuse(olmoe, f"{shard.name} is torn: it has")


def test_garbage_for_a_header_is_refused(olmoe):
    """A file that is not safetensors at all, and one whose header is not an object."""
    shard = damaged.shard_with(olmoe, EXPERT)
    shard.write_bytes(b"\x93NUMPY" * 1000)
    refuse(olmoe, "is torn: it has a header of [0-9]{19} bytes, above the format's limit")
    shard.write_bytes((4).to_bytes(8, "little") + b"[1] ")
    refuse(olmoe, "a header that is not safetensors")


def test_a_range_that_does_not_fit_its_shape_is_refused(tmp_path):
    """A header that gives 4 bytes to two float32 numbers."""
    from melinoe.checkpoint.safetensors_file import SafetensorsFile

    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"4 bytes for shape \[2\] of F32"):
        SafetensorsFile(path)


def test_a_missing_shard_is_named(olmoe):
    """The index names a shard that is not there."""
    shard = damaged.shard_with(olmoe, EXPERT)
    shard.unlink()
    refuse(olmoe, f"the shard {shard.name} that .*index.json names is missing")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(olmoe):
    """The index and the shards are of two downloads."""
    damaged.edit_json(olmoe / INDEX, lambda i: i["weight_map"].update(more=i["weight_map"][EXPERT]))
    refuse(olmoe, "does not hold more, which the index says it does")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {"a": "../a"}}'])
def test_an_unreadable_index_is_refused(olmoe, content):
    """Empty, of another kind, without a map, or pointing out of the directory."""
    (olmoe / INDEX).write_text(content)
    refuse(olmoe, "index.json is not readable")


def test_an_expert_without_a_tensor_is_refused(olmoe):
    """One expert's projection is in no shard: 3 of 4, never a random one or a shifted one."""
    damaged.rewrite(damaged.shard_with(olmoe, EXPERT), lambda tensors: tensors.pop(EXPERT))
    damaged.edit_json(olmoe / INDEX, lambda index: index["weight_map"].pop(EXPERT))
    refuse(olmoe, r"gate_up_proj needs 4 tensors .*up_proj.* and the checkpoint has 3")


def test_a_backbone_without_a_tensor_is_refused(olmoe):
    """A missing attention weight is an error where from_pretrained would make a random one."""
    key = "model.layers.0.self_attn.k_proj.weight"
    damaged.rewrite(damaged.shard_with(olmoe, key), lambda tensors: tensors.pop(key))
    damaged.edit_json(olmoe / INDEX, lambda index: index["weight_map"].pop(key))
    refuse(olmoe, f"lacks 1 of the model's tensors, first {key}")


@pytest.mark.parametrize(
    "key", [EXPERT, "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate.weight"]
)
def test_a_tensor_of_another_shape_is_refused(olmoe, key):
    """Experts and backbone alike: the tensor is named, and what it should have been."""
    damaged.rewrite(
        damaged.shard_with(olmoe, key), lambda tensors: tensors.update({key: torch.zeros(3, 5)})
    )
    refuse(olmoe, "3x5.*(?:the weights are of another model|do not belong to this config)")


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "gptq", "awq", "bitsandbytes"])
def test_a_quantised_checkpoint_is_refused_by_its_kind(olmoe, kind):
    """Before its weights are looked at."""
    damaged.edit_json(
        olmoe / "config.json", lambda c: c.update(quantization_config={"quant_method": kind})
    )
    refuse(olmoe, rf"is quantised \({kind}\)")


def test_pickled_weights_are_never_opened(olmoe):
    """Only .bin files: refused, with what to convert them by."""
    for file in [*olmoe.glob("*.safetensors"), olmoe / INDEX]:
        file.unlink()
    refuse(olmoe, "has no model.safetensors and no model.safetensors.index.json")
    (olmoe / "pytorch_model.bin").write_bytes(b"anything")
    refuse(olmoe, "only pickled .bin weights.*save_pretrained")


def test_what_is_no_checkpoint_is_refused(olmoe, tmp_path):
    """No config, a garbled config, a path that is not there, a file, a name that is nowhere."""
    refuse(tmp_path, "has no config.json")
    refuse(tmp_path / "nowhere", "does not exist")
    refuse("~nobody-of-that-name/nowhere", "does not exist")
    refuse(olmoe / "config.json", "is a file")
    refuse("nobody/no-such-model", "no such model in the local cache or on the hub")
    (olmoe / "config.json").write_text("{")
    refuse(olmoe, "config.json is not readable JSON")


def test_a_family_that_cannot_be_served_is_refused_by_name(olmoe):
    """Unknown to transformers; known but dense; an architecture that does not exist."""
    config = olmoe / "config.json"
    damaged.edit_json(config, lambda c: c.update(architectures=["NoSuchModel"]))
    refuse(olmoe, "no architecture NoSuchModel", UnsupportedModelError)
    damaged.edit_json(config, lambda c: c.update(model_type="no_such_family"))
    refuse(olmoe, "'no_such_family'", UnsupportedModelError)
    dense = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    config.write_text(json.dumps(dense | {"hidden_size": 32, "num_attention_heads": 2}))
    with pytest.raises(UnsupportedModelError, match="llama has no mixture-of-experts layers"):
        open_checkpoint(str(olmoe))


def test_a_shard_that_shrinks_while_open_is_noticed(olmoe):
    """The bytes an expert should be read from are gone: an error, never zeros."""
    with open_checkpoint(str(olmoe)) as checkpoint:
        source = checkpoint.experts[1]
        into = {t.name: torch.empty(t.shape) for t in source.layer.tensors}
        source.read(2, into)
        with damaged.shard_with(olmoe, EXPERT).open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(CheckpointError, match="was changed after it was opened"):
            for expert in range(4):
                source.read(expert, into)
