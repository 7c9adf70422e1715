"""Files that are wrong on purpose or by a bad disk: each is one sentence, none is believed."""

import json
import os
import re

import damaged
import pytest
import torch

from melinoe.checkpoint import describe, load_backbone, open_checkpoint
from melinoe.checkpoint.safetensors_file import SafetensorsFile
from melinoe.errors import CheckpointError, ModelError

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
INDEX = "model.safetensors.index.json"
F32_AT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def olmoe(tmp_path):
    return damaged.write_olmoe(tmp_path / "olmoe")


def write_header(path, header, data: bytes = bytes(8)):
    """A safetensors file of any header: an object, or the text of one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refuse(action, message):
    """It ends in one sentence with a way out."""
    with pytest.raises(ModelError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert re.search(r"; .*(?:download|use|give|of another model|check|config)", str(caught.value))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": F32_AT, "y": F32_AT}, "x and y share bytes"),
        ({"x": F32_AT | {"data_offsets": [4, 12]}}, "4 bytes before x that belong to no tensor"),
        ({"x": F32_AT | {"shape": [2.0]}}, "a header that is not safetensors"),
        ({"x": F32_AT | {"shape": "2"}}, "a header that is not safetensors"),
        ({"x": F32_AT | {"data_offsets": [0.0, 8.0]}}, "a header that is not safetensors"),
        ({"x": F32_AT | {"data_offsets": [8, 0]}}, "a header that is not safetensors"),
        ({"x": F32_AT | {"shape": [-2], "data_offsets": [0, -8]}}, "a header that is not safete"),
        ({"x": F32_AT | {"shape": [True, 2]}}, "a header that is not safetensors"),
        (b'{"x": %s, "x": %s}' % ((json.dumps(F32_AT).encode(),) * 2), "names x twice"),
        (b"[" * 200_000, "a header that is not safetensors"),
        (b"\xff\xfe{}", "a header that is not safetensors"),
    ],
)
def test_a_header_that_no_writer_makes_is_refused(tmp_path, header, message):
    """Overlaps, holes, numbers that are none, a name twice, brackets without end, no text."""
    path = write_header(
        tmp_path / "x.safetensors", header, bytes(12 if "4, 12" in str(header) else 8)
    )
    message = message.replace("its header|", "")
    refuse(lambda: SafetensorsFile(path), message.replace("its header", "a header that is not"))


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    """As the format's own reader does: two downloads in one file, say."""
    path = write_header(tmp_path / "x.safetensors", {"x": F32_AT}, bytes(9))
    refuse(lambda: SafetensorsFile(path), "has 1 bytes behind its last tensor")


def test_an_absurd_header_length_asks_for_no_memory(tmp_path):
    """A sparse file of 300 GB whose header claims 200 GB: refused for the claim, nothing read."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((200 * 10**9).to_bytes(8, "little"))
        file.truncate(300 * 10**9)
    refuse(
        lambda: SafetensorsFile(path), "a header of 200000000000 bytes, above the format's limit"
    )


def test_a_type_that_torch_has_not_is_named(tmp_path):
    """Four-bit floats: not torn, but of a kind that is not read here."""
    path = write_header(tmp_path / "x.safetensors", {"x": F32_AT | {"dtype": "F4"}})
    refuse(lambda: SafetensorsFile(path), "keeps x as F4, a type that is not read here")


def test_a_refused_file_is_closed_at_once(tmp_path):
    """A refusal holds no descriptor, however long its error is kept."""
    path = write_header(tmp_path / "x.safetensors", {"x": F32_AT}, b"")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError) as kept:
        SafetensorsFile(path)
    assert len(os.listdir("/proc/self/fd")) == before
    assert kept.value is not None


def test_a_bad_disk_is_one_sentence(olmoe, monkeypatch):
    """The system's own error while a header or an expert is read: the file is named."""
    checkpoint = open_checkpoint(str(olmoe))
    into = {t.name: torch.empty(t.shape) for t in checkpoint.layers[1].tensors}

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    refuse(lambda: checkpoint.experts[1].read(2, into), "cannot be read .Input/output error.")
    monkeypatch.setattr(os, "pread", broken)
    refuse(lambda: open_checkpoint(str(olmoe)), "cannot be read .Input/output error.")
    checkpoint.close()


def test_a_config_that_cannot_be_read_is_one_sentence(olmoe):
    """Brackets without end, and bytes that are no text."""
    for content in (b"[" * 200_000, b"\xff\xfe"):
        (olmoe / "config.json").write_bytes(content)
        refuse(lambda: open_checkpoint(str(olmoe)), "config.json is not readable JSON")


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "..", "", "sub/x.safetensors", "config.json", 3, None],
)
def test_an_index_may_only_name_safetensors_files_beside_it(olmoe, shard):
    """No way out of the directory, no other file, nothing that is not a name."""
    damaged.edit_json(olmoe / INDEX, lambda index: index["weight_map"].update({EXPERT: shard}))
    refuse(lambda: open_checkpoint(str(olmoe)), "index.json is not readable .its weight_map names")


def test_a_tensor_in_two_shards_is_taken_from_where_the_index_says(olmoe):
    """A later shard holds another copy, of zeros: the index decides, not the order of files."""
    index = json.loads((olmoe / INDEX).read_text())["weight_map"]
    other = olmoe / max(set(index.values()) - {index[EXPERT]})
    damaged.rewrite(other, lambda tensors: tensors.update({EXPERT: torch.zeros(8, 16)}))
    with open_checkpoint(str(olmoe)) as checkpoint:
        into = {t.name: torch.empty(t.shape) for t in checkpoint.layers[1].tensors}
        checkpoint.experts[1].read(2, into)
    assert into["gate_up_proj"][8:].abs().min() > 0


def test_two_names_for_one_parameter_are_refused(olmoe):
    """The same weight with and without the base model's prefix: which one counts is not ours."""
    key = "model.layers.0.self_attn.k_proj.weight"
    damaged.rewrite(
        damaged.shard_with(olmoe, key),
        lambda tensors: tensors.update({key.removeprefix("model."): tensors[key] + 1}),
    )
    refuse(lambda: open_checkpoint(str(olmoe)), "layers.0.self_attn.k_proj.weight and .* are both")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("key", [EXPERT, "model.layers.0.self_attn.k_proj.weight"])
def test_weights_of_a_type_that_needs_scales_are_refused(olmoe, key, dtype):
    """Quantised weights whose config says nothing of it would be read as plain numbers."""
    damaged.rewrite(
        damaged.shard_with(olmoe, key),
        lambda tensors: tensors.update({key: tensors[key].to(dtype)}),
    )
    refuse(lambda: open_checkpoint(str(olmoe)), f"{key} is stored as {str(dtype)[6:]}")


def test_a_quantisation_declared_in_any_part_of_the_config_is_refused(olmoe):
    """Deep in a composite config, or in the older key of compressed-tensors."""
    for change in (
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}},
        {"compression_config": {"quant_method": "fp8"}},
    ):
        before = (olmoe / "config.json").read_text()
        damaged.edit_json(olmoe / "config.json", lambda config, c=change: config.update(c))
        refuse(lambda: open_checkpoint(str(olmoe)), r"is quantised \(fp8\)")
        (olmoe / "config.json").write_text(before)


def test_an_expert_whose_number_is_missing_is_refused(olmoe):
    """Experts 0, 1, 2 and 4 of 4: as many as wanted, and the last would answer for the fourth."""
    for part in ("gate", "up", "down"):
        old = f"model.layers.1.mlp.experts.3.{part}_proj.weight"
        new = old.replace("experts.3", "experts.4")
        damaged.rewrite(
            damaged.shard_with(olmoe, old), lambda t, o=old, n=new: t.update({n: t.pop(o)})
        )
        damaged.edit_json(
            olmoe / INDEX,
            lambda i, o=old, n=new: i["weight_map"].update({n: i["weight_map"].pop(o)}),
        )
    refuse(lambda: open_checkpoint(str(olmoe)), "has them for experts 0, 1, 2, 4")


def test_more_experts_than_the_config_says_are_of_another_model(olmoe):
    """Nothing is missing, so nothing is to be downloaded again."""
    damaged.edit_json(olmoe / "config.json", lambda config: config.update(num_experts=3))
    refuse(lambda: open_checkpoint(str(olmoe)), "checkpoint has 4; .* of another model than")


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"dtype": "int8"},
        {"hidden_act": "no_such_function"},
        {"hidden_size": -16},
        {"architectures": ["MixtralForCausalLM"]},
    ],
)
def test_a_config_that_no_model_can_be_built_from_is_one_sentence(olmoe, change):
    """Whatever transformers trips over, also where the architecture is of another family."""
    damaged.edit_json(olmoe / "config.json", lambda config: config.update(change))
    refuse(lambda: open_checkpoint(str(olmoe)), "config")
    assert not describe(str(olmoe)).supported


def test_a_broken_generation_config_is_one_sentence(olmoe):
    """It decides where texts end, so it is not skipped."""
    (olmoe / "generation_config.json").write_text("{")
    with open_checkpoint(str(olmoe)) as checkpoint:
        refuse(lambda: load_backbone(checkpoint), "generation_config.json is not readable")


def test_a_description_without_a_dtype_counts_the_stored_one(olmoe):
    """The config names no type and the shards hold float32: experts and backbone alike."""
    whole = describe(str(olmoe))
    damaged.edit_json(olmoe / "config.json", lambda config: config.pop("dtype"))
    found = describe(str(olmoe))
    assert (found.dtype, found.backbone_bytes) == ("float32", whole.backbone_bytes)


def test_a_type_that_is_none_is_refused_before_anything_is_opened(olmoe, monkeypatch):
    """A caller's mistake costs no download."""
    from melinoe.checkpoint import opening

    monkeypatch.setattr(opening, "open_shards", lambda *_: 1 / 0)
    for dtype in ("int8", "no_such_type"):
        with pytest.raises(ValueError, match=r"dtype must be .auto. or one of"):
            open_checkpoint(str(olmoe), dtype)
        with pytest.raises(ValueError, match=r"dtype must be .auto. or one of"):
            describe(str(olmoe), dtype)


def test_tensors_that_the_model_has_no_use_for_are_never_read(olmoe, monkeypatch, caplog):
    """Layers beyond the config's, as for drafting tokens: named in a warning, not a byte read."""
    extra = {
        "model.layers.7.self_attn.q_proj.weight": torch.zeros(16, 16),
        "model.layers.7.mlp.experts.0.up_proj.weight": torch.zeros(8, 16),
        "something.else": torch.zeros(3),
    }
    shard = damaged.shard_with(olmoe, EXPERT)
    damaged.rewrite(shard, lambda tensors: tensors.update(extra))
    damaged.edit_json(
        olmoe / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(extra, shard.name))
    )
    real, read = SafetensorsFile.read, []

    def noting(self, name, into, first=0):
        read.append(name)
        real(self, name, into, first)

    monkeypatch.setattr(SafetensorsFile, "read", noting)
    with open_checkpoint(str(olmoe)) as checkpoint:
        load_backbone(checkpoint)
    assert read and not extra.keys() & set(read)
    assert "3 stored tensors are not used by the model, first model.layers.7" in caplog.text


def test_tied_embeddings_are_counted_once(tmp_path):
    """Stored once or twice, they are one matrix of 64 x 16 in memory."""
    apart = describe(str(damaged.write_olmoe(tmp_path / "apart")))
    path = damaged.write_olmoe(tmp_path / "tied", tie_word_embeddings=True)
    tied = describe(str(path))
    assert apart.backbone_bytes - tied.backbone_bytes == 64 * 16 * 4
    key = "model.embed_tokens.weight"
    damaged.rewrite(
        damaged.shard_with(path, key), lambda t: t.update({"lm_head.weight": t[key].clone()})
    )
    with open_checkpoint(str(path)) as checkpoint:
        model = load_backbone(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert describe(str(path)).backbone_bytes == tied.backbone_bytes
