"""Sums are recorded when a checkpoint is written, and `doctor --verify` holds its files to them."""

import hashlib
import json
import os

import pytest
import torch
from damaged import edit_json, rewrite, write_olmoe
from small_olmoe import words_tokenizer
from typer.testing import CliRunner

import melinoe
from melinoe.checkpoint import open_checkpoint, read_metadata
from melinoe.checkpoint.backbone import load_model
from melinoe.checkpoint.verifying import Verified, verify
from melinoe.checkpoint.writing import write_model
from melinoe.cli.app import app
from melinoe.errors import CheckpointError
from melinoe.moe.routing import fingerprint
from melinoe.report.card import write_card

ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def written(tmp_path):
    """A checkpoint that was written with its record."""
    base = write_olmoe(tmp_path / "base", shard="1GB")
    words_tokenizer().save_pretrained(base)
    with open_checkpoint(base) as checkpoint:
        model = load_model(checkpoint)
    found = {"base": "base", "fingerprint": fingerprint(model)}
    write_model(model, str(base), tmp_path / "tuned", found, [])
    return tmp_path / "tuned"


def test_the_record_holds_every_other_file(written):
    """Sizes and sums by hashlib's own reading; the card that comes later is not among them."""
    recorded = read_metadata(written)["files"]
    others = {one.name for one in written.iterdir()} - {"melinoe.json"}
    assert recorded.keys() == others
    assert "model.safetensors" in others
    for name, facts in recorded.items():
        content = (written / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (written / "README.md").write_text("a card")
    assert verify(str(written)) == Verified(len(others), 0, 0, True)


def test_the_smallest_change_of_any_file_is_found(written):
    """One bit of each file in turn, and each file gone; all of them are named at once."""
    names = sorted(read_metadata(written)["files"])
    for name in names:
        whole = (written / name).read_bytes()
        middle = 4 * len(whole) // 5  # in the weights, behind the header
        (written / name).write_bytes(
            whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        )
        with pytest.raises(CheckpointError):
            verify(str(written))
        (written / name).write_bytes(whole)
    verify(str(written))
    (written / "generation_config.json").write_text("{}")
    (written / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError) as found:
        verify(str(written))
    assert "generation_config.json has 2 bytes instead of" in str(found.value)
    assert "tokenizer_config.json is missing" in str(found.value)


def test_the_command_says_what_was_compared(written):
    """In a row, as JSON, and as an error with exit 1."""
    run = CliRunner().invoke
    count = len(read_metadata(written)["files"])
    said = run(app, ["doctor", str(written), "--verify"])
    assert f"{count} files are what melinoe.json says" in said.stdout.replace("\n", " ")
    told = json.loads(run(app, ["doctor", str(written), "--verify", "--json"]).stdout)["verified"]
    assert told == {"recorded": count, "named": 0, "unknown": 0, "fingerprint": True}
    assert "verified" not in json.loads(run(app, ["doctor", str(written), "--json"]).stdout)
    with (written / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    failed = run(app, ["doctor", str(written), "--verify"])
    assert isinstance(failed.exception, CheckpointError)
    assert "model.safetensors has other contents" in str(failed.exception)


def test_a_checkpoint_without_a_record_is_read_and_no_more_is_said(tmp_path):
    """Nobody knows its sums; every shard is counted as such."""
    base = write_olmoe(tmp_path / "base")
    shards = len(list(base.glob("*.safetensors")))
    assert verify(str(base)) == Verified(0, 0, shards, False)


def test_the_hubs_cache_names_a_blob_by_its_sum(tmp_path):
    """A snapshot's shard links to a blob of that name: a flipped bit is found."""
    base = write_olmoe(tmp_path / "base", shard="1GB")
    content = (base / "model.safetensors").read_bytes()
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    os.replace(base / "model.safetensors", blob)
    (base / "model.safetensors").symlink_to(blob)
    assert verify(str(base)) == Verified(0, 1, 0, False)
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors has other contents"):
        verify(str(base))


def other_routers(tensors):
    tensors[ROUTER] += 1


def test_routers_of_another_model_are_refused_on_load(written):
    """The cheap part is checked each time: a router that melinoe.json does not speak of."""
    melinoe.load(written, slots=2)[1].detach()
    rewrite(written / "model.safetensors", other_routers)
    with pytest.raises(CheckpointError, match=r"routers of .* or delete melinoe\.json"):
        melinoe.load(written, slots=2)
    (written / "melinoe.json").unlink()
    melinoe.load(written, slots=2)


def test_another_type_is_no_other_model(written):
    """Loaded in a type that rounds, routers differ and are not compared."""
    rewrite(written / "model.safetensors", lambda tensors: None)
    model, _ = melinoe.load(written, slots=2, dtype=torch.bfloat16)
    assert fingerprint(model) != read_metadata(written)["fingerprint"]


def test_later_changes_of_the_record_keep_the_sums(written):
    """Whatever else is written into melinoe.json, and the card beside it."""
    before = read_metadata(written)["files"]
    edit_json(written / "melinoe.json", lambda record: record.update(license="mit"))
    write_card(written)
    assert read_metadata(written)["files"] == before
    verify(str(written))
