"""A model in the hub's local cache opens by its name, offline, with nothing but what lies there."""

import damaged
import pytest
import torch
from hub_cache import add_snapshot, commit_id, empty_cache
from transformers import OlmoeForCausalLM

import melinoe
from melinoe.checkpoint import (
    check_output,
    describe,
    load_tokenizer,
    open_checkpoint,
    read_metadata,
    write_metadata,
)
from melinoe.checkpoint.files import hub_arguments
from melinoe.errors import CheckpointError
from melinoe.shipped import TINY_OLMOE

NAME = "nobody/olmoe"
INDEX = "model.safetensors.index.json"
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return empty_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def files(tmp_path):
    return damaged.write_olmoe(tmp_path / "olmoe")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_sharded_model_runs_by_its_name_offline(cache, files):
    """Links to blobs, several shards, no word about files that never were: as from the files."""
    add_snapshot(cache, NAME, files, commit_id(1))
    model, handle = melinoe.load(NAME, slots=2, store="disk")
    expected = OlmoeForCausalLM.from_pretrained(files)
    torch.testing.assert_close(logits(model), logits(expected), atol=1e-5, rtol=1e-5)
    assert model.config.name_or_path == NAME
    assert model.generation_config.eos_token_id == 1
    assert read_metadata(NAME) == {}
    handle.detach()


def test_a_trained_model_of_one_file_runs_by_its_name_with_its_tokenizer(cache):
    """The shipped model, put into a cache: config, weights and tokenizer come from there."""
    add_snapshot(cache, "org/tiny", TINY_OLMOE, commit_id(7))
    with open_checkpoint("org/tiny") as checkpoint:
        tokenizer = load_tokenizer("org/tiny", checkpoint.config)
        assert len(checkpoint.layers) == 4
    assert len(load_tokenizer("org/tiny@main", checkpoint.config)) == len(tokenizer)
    assert tokenizer.decode(tokenizer("One apple.")["input_ids"]) == "One apple."


def test_a_revision_is_chosen_by_an_at_sign(cache, files, tmp_path):
    """Main, a tag and a commit of one repository are three answers; an unknown one is refused."""
    add_snapshot(cache, NAME, files, commit_id(1))
    tagged = damaged.write_olmoe(tmp_path / "tagged", num_experts=6)
    write_metadata(tagged, {"which": "tagged"})
    add_snapshot(cache, NAME, tagged, commit_id(2), ref="v2")
    for revision, experts in (("", 4), ("@main", 4), ("@v2", 6), (f"@{commit_id(2)}", 6)):
        with open_checkpoint(NAME + revision) as checkpoint:
            assert checkpoint.experts[0].num_experts == experts
        assert describe(NAME + revision).num_experts == experts
    assert read_metadata(f"{NAME}@v2") == {"which": "tagged"}
    whole = OlmoeForCausalLM.from_pretrained(**hub_arguments(f"{NAME}@v2"))
    assert whole.config.num_experts == 6
    with pytest.raises(CheckpointError, match=f"{NAME}@v3 is no directory here"):
        open_checkpoint(f"{NAME}@v3")


def test_config_and_shards_are_of_one_commit(cache, files, tmp_path, monkeypatch):
    """A branch that moves after the config was read does not bring the other commit's shards."""
    add_snapshot(cache, NAME, files, commit_id(1))
    other = damaged.write_olmoe(tmp_path / "other", num_experts=6)
    from melinoe.checkpoint import opening

    real = opening.open_shards

    def moved(*arguments):
        add_snapshot(cache, NAME, other, commit_id(2))
        return real(*arguments)

    monkeypatch.setattr(opening, "open_shards", moved)
    with open_checkpoint(NAME) as checkpoint:
        shards = {place.file.path.parent.name for place in checkpoint.files.values()}
    assert shards == {commit_id(1)}


def test_a_shard_that_was_not_downloaded_is_named(cache, files):
    """An interrupted download: the shard is missing, or its link leads nowhere."""
    snapshot = add_snapshot(cache, NAME, files, commit_id(1))
    shard = sorted(snapshot.glob("*.safetensors"))[2]
    blob = shard.resolve()
    blob.rename(blob.with_suffix(".incomplete"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"the shard {shard.name} that .* is missing"):
            open_checkpoint(NAME)
        found = describe(NAME)
        assert (found.supported, found.weights, found.num_experts) == (True, False, 4)
        shard.unlink(missing_ok=True)


def test_a_config_alone_is_described_and_not_opened(cache, files):
    """`doctor` fetches no weights: the config is enough for it, and opening says what lacks."""
    for file in files.glob("model*"):
        file.unlink()
    add_snapshot(cache, NAME, files, commit_id(1))
    found = describe(NAME)
    assert (found.supported, found.weights, found.expert_bytes) == (True, False, 12288)
    with pytest.raises(CheckpointError, match="local cache or on the hub as far as it can be rea"):
        open_checkpoint(NAME)


def test_a_directory_with_an_at_sign_is_a_directory(tmp_path):
    """No revision is looked for where the name is a path that exists."""
    path = damaged.write_olmoe(tmp_path / "run@3")
    with open_checkpoint(str(path)) as checkpoint:
        assert checkpoint.name == str(path)
    assert check_output(tmp_path / "a@b") == tmp_path / "a@b"
