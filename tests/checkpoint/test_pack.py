"""A checkpoint written with packed experts loads as what packing while loading gives."""

import json
import re
import shutil

import damaged
import packed_checkpoints
import pytest
import torch
from data_rows import write
from safetensors.torch import load_file
from small_olmoe import words_tokenizer
from transformers import AutoModelForCausalLM

from melinoe.checkpoint import (
    load_model,
    open_checkpoint,
    pack,
    read_metadata,
    write_metadata,
)
from melinoe.checkpoint.export_rules import find_export_faults
from melinoe.checkpoint.safetensors_file import SafetensorsFile
from melinoe.checkpoint.verifying import verify
from melinoe.errors import (
    BudgetError,
    CheckpointError,
    OutputExistsError,
    UnsupportedModelError,
)
from melinoe.experts.formats import named_format
from melinoe.host_memory import HostMemory


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain OLMoE in shards, large enough to be packed."""
    place = tmp_path_factory.mktemp("pack") / "base"
    return damaged.write_olmoe(place, hidden_size=32, intermediate_size=16)


def test_whole_blocks_of_a_written_file_lie_where_the_disk_s_do(tmp_path):
    """Tensors of whole blocks begin with one, whatever else the file holds; others read it too."""
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "scales": torch.randn(6, 100).half(),
        "codes": torch.randint(0, 256, (2, 8192), dtype=torch.uint8),
        "weights": torch.randn(32, 64).bfloat16(),
        "one": torch.tensor(3.0),
    }
    pack._save(tensors, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    places = SafetensorsFile(tmp_path / "x.safetensors").tensors
    assert [places[name].start % 4096 for name in ("codes", "weights")] == [0, 0]


@pytest.mark.parametrize("format", ["int4", "int8", "mxfp4"])
def test_packed_experts_are_what_the_format_makes_of_the_base(base, tmp_path, monkeypatch, format):
    """Part by part; the rest is the base's; every file's sum is recorded."""
    monkeypatch.setattr("melinoe.checkpoint.pack.SHARD_BYTES", 1 << 13)
    if format == "mxfp4":
        base = damaged.write_olmoe(tmp_path / "base", hidden_size=32, intermediate_size=32)
    pack.pack(str(base), format, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    made = named_format(format)
    with open_checkpoint(str(base)) as plain, open_checkpoint(str(tmp_path / "out")) as packed:
        for before, after in zip(plain.experts, packed.experts, strict=True):
            assert after.format == made
            parts = made.parts(before.layer.tensors)
            for expert in range(before.num_experts):
                read = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in parts}
                expected = {name: torch.empty_like(part) for name, part in read.items()}
                after.read_block(expert, made, read)
                before.read_block(expert, made, expected)
                for name, part in expected.items():
                    assert torch.equal(read[name].view(torch.uint8), part.view(torch.uint8)), name
        ours, theirs = load_model(packed).state_dict(), load_model(plain).state_dict()
        for name in [place.name for place in packed.backbone]:
            assert torch.equal(ours[name], theirs[name]), name
    assert verify(str(tmp_path / "out")).recorded >= 3


@pytest.mark.parametrize("way", ["MXFP4", "FP8"])
def test_unpacking_gives_a_checkpoint_that_transformers_loads(tmp_path, caplog, way):
    """Under the base's plain names, equal to the weights that the packed ones mean, in bfloat16."""
    settings = getattr(packed_checkpoints, way)
    packed = packed_checkpoints.write_packed(tmp_path / "base", settings)
    pack.pack(str(packed), "plain", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        packed.parent / "plain", dtype=torch.bfloat16
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert "a second time" not in caplog.text
    pack.pack(str(packed), "int8", tmp_path / "again")  # from one packed format into another
    assert "a second time to int8" in caplog.text
    with open_checkpoint(str(tmp_path / "again")) as checkpoint:
        assert checkpoint.experts[0].format == named_format("int8")


def test_another_default_device_changes_no_byte(base, tmp_path):
    """What is read and packed stays on the host."""
    pack.pack(str(base), "int4", tmp_path / "out")
    with torch.device("meta"):
        pack.pack(str(base), "int4", tmp_path / "other")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()


def test_nothing_is_written_where_it_cannot_be(base, tmp_path):
    """A taken place, an unknown format, one that is there already, a shape that does not fit."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(OutputExistsError):
        pack.pack(str(base), "int4", tmp_path / "taken")
    small = damaged.write_olmoe(tmp_path / "small")
    for source, format, words in (
        (base, "int3", "there is no format 'int3'"),
        (base, "plain", "as plain already"),
        (small, "mxfp4", "multiple of 32"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            pack.pack(str(source), format, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "taken"]


def test_the_command_packs(base, tmp_path, melinoe):
    """And says so in the config."""
    code, _, err = melinoe("pack", base, "--format", "int4", "--out", tmp_path / "out")
    assert code == 0 and err.startswith("wrote ")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "melinoe", "format": "int4", "transposed": False}
    found = find_export_faults(str(tmp_path / "out"))
    assert any("only Melinoe reads them" in one.why for one in found)


def test_an_adapter_of_a_packed_base_is_merged_into_the_base_unpacked(tmp_path, melinoe):
    """Training a packed base gives an adapter; a checkpoint is refused, with these two commands."""
    packed = packed_checkpoints.write_packed(tmp_path / "base", packed_checkpoints.MXFP4)
    words_tokenizer().save_pretrained(packed)
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": "w5 w6"} for i in range(2, 10)]
    data = tmp_path / "data.jsonl"
    write(data, *rows)
    train = ["finetune", packed, "--data", data, "--steps", 1, "--batch-size", 2, "--out"]
    code, _, err = melinoe(*train, tmp_path / "tuned")
    assert code == 1 and "--save adapter" in err and "melinoe pack" in err
    assert melinoe(*train, tmp_path / "adapter", "--save", "adapter")[0] == 0
    merge = ["merge", tmp_path / "adapter", "--out", tmp_path / "merged"]
    code, _, err = melinoe(*merge)
    assert code == 1 and "stored packed (mxfp4)" in err
    assert melinoe("pack", packed, "--format", "plain", "--out", tmp_path / "unpacked")[0] == 0
    assert melinoe(*merge, "--base", tmp_path / "unpacked")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked").state_dict()
    moved = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert any("experts" in name for name in moved) and any("router" in name for name in moved)
    assert not any("embed" in name or "norm" in name for name in moved)
    # Or in one command, packed again: what packing the merged checkpoint gives, and how far off.
    code, _, err = melinoe(*merge[:-1], tmp_path / "packed", "--format", "mxfp4")
    assert code == 0 and re.search(r"its experts are \d+\.\d% off", err)
    pack.pack(str(tmp_path / "merged"), "mxfp4", tmp_path / "by hand")
    for path in sorted((tmp_path / "by hand").glob("*.safetensors")):
        assert (tmp_path / "packed" / path.name).read_bytes() == path.read_bytes()
    assert read_metadata(tmp_path / "packed")["base"] == "packed"
    assert not list(tmp_path.glob(".*"))


def test_what_was_measured_of_plain_experts_is_not_said_of_rounded_ones(base, tmp_path):
    """The outcome goes, its card becomes the base's; plain weights that mean the same keep it."""
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    one = {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    routing = {"experts_per_sequence": [1.0], "experts_per_sequence_mean": one, "reuse": one,
               "distinct_experts": 1.0, "caches": {}}  # fmt: skip
    change = {"experts_per_sequence": one, "transfers_per_token": {}}
    counts = ("examples", "prompts", "max_new_tokens", "slots", "num_experts", "top_k", "layers")
    outcome = dict.fromkeys(counts, 1)
    for name in ("before", "after"):
        outcome[name] = {"perplexity": {}, "writing": routing, "reading": routing}
    outcome["change"] = {"perplexity": {}, "writing": change, "reading": change}
    write_metadata(tuned, {"base": "base", "outcome": outcome})
    (tuned / "README.md").write_text("3 times fewer")
    pack.pack(str(tuned), "int4", tmp_path / "packed")
    found = read_metadata(tmp_path / "packed")
    assert found["base"] == "base" and "outcome" not in found
    assert not (tmp_path / "packed" / "README.md").exists()
    assert (tmp_path / "packed" / "BASE_README.md").read_text() == "3 times fewer"
    write_metadata(tmp_path / "packed", {"base": "base", "outcome": outcome})
    pack.pack(str(tmp_path / "packed"), "plain", tmp_path / "plain")
    assert read_metadata(tmp_path / "plain")["outcome"] == outcome


def test_where_memory_is_short_files_are_smaller_and_too_little_is_said(
    base, tmp_path, monkeypatch
):
    """A quarter of what is free waits for a file; below two of the largest tensors nothing runs."""
    pack.pack(str(base), "int4", tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    left = HostMemory(1 << 14, "the limit of a test")
    monkeypatch.setattr("melinoe.host_memory.host_memory", lambda *_: left)
    pack.pack(str(base), "int4", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    left = HostMemory(1 << 10, "the limit of a test")
    for format in ("int4", "plain"):
        source = base if format == "int4" else tmp_path / "one"
        with pytest.raises(BudgetError, match=r"the limit of a test\); pack on a host with more"):
            pack.pack(str(source), format, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    monkeypatch.undo()
    assert verify(str(tmp_path / "many")).recorded >= 3


@pytest.mark.parametrize("format", ["int4", "int8"])
def test_a_packed_expert_that_is_not_what_was_packed_is_refused_when_it_is_first_read(
    base, tmp_path, format
):
    """One bit of a code or a scale, changed before the file is opened; as block and as weights."""
    pack.pack(str(base), format, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("model-*.safetensors")
    whole = shard.read_bytes()
    for kind in ("codes", "scales"):
        with open_checkpoint(str(tmp_path / "out")) as checkpoint:
            source = checkpoint.experts[1]
            reader = source.readers[source.layer.tensors[0].name]
            info = reader.places()[0].stored[kind].info
        flipped = bytearray(whole)
        flipped[info.start + (info.stop - info.start) // source.num_experts * 2] ^= 1  # expert 2
        shard.write_bytes(flipped)
        for plain in (False, True):
            with open_checkpoint(str(tmp_path / "out")) as checkpoint:
                source = checkpoint.experts[1]
                parts = source.layer.tensors if plain else source.format.parts(source.layer.tensors)
                into = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in parts}

                def read(expert, source=source, into=into, plain=plain):
                    if plain:
                        source.read(expert, into)
                    else:
                        source.read_block(expert, source.format, into)

                read(1)
                for _ in range(2):
                    with pytest.raises(CheckpointError, match=r"expert 2 of .* is not what was"):
                        read(2)
    shard.write_bytes(whole)
    with open_checkpoint(str(tmp_path / "out")) as checkpoint:
        for expert in range(checkpoint.experts[1].num_experts):
            checkpoint.experts[1].read(
                expert,
                {t.name: torch.empty(t.shape, dtype=t.dtype) for t in source.layer.tensors},
            )
