"""Fine-tuning a base that is named as on the hub, out of a cache in the hub's own layout."""

import pytest
from checkpoint.hub_cache import add_snapshot, commit_id, empty_cache
from small_runs import settings

from melinoe.checkpoint import describe_base
from melinoe.checkpoint.metadata import read_metadata, update_metadata
from melinoe.data import load_examples
from melinoe.finetune import finetune
from melinoe.report.card import base_link

NAME = "org/tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return empty_cache(tmp_path / "cache", monkeypatch)


def test_the_record_names_the_commit_that_was_trained(checkpoint, cache):
    """Of a branch, the commit that it meant then; of a directory, none. The card links to it."""
    add_snapshot(cache, NAME, checkpoint / "base", commit_id(3))
    data = load_examples(checkpoint / "data.jsonl")
    for base, out, commit in ((NAME, "hub", commit_id(3)), (checkpoint / "base", "local", None)):
        finetune(base, data, checkpoint / out, settings(steps=1))
        update_metadata(checkpoint / out, **describe_base(base))
        assert read_metadata(checkpoint / out)["base_commit"] == commit
    link = base_link(NAME, read_metadata(checkpoint / "hub"))
    assert link == f"[{NAME}](https://huggingface.co/{NAME}/tree/{commit_id(3)})"
    assert base_link("base", read_metadata(checkpoint / "local")) == "base"
