"""melinoe.json: stamped, checked when read, and what it says of base and data."""

import hashlib
import json

import pytest

from melinoe.checkpoint import (
    describe_base,
    describe_data,
    read_metadata,
    update_metadata,
    write_metadata,
)
from melinoe.data import load_examples
from melinoe.errors import CheckpointError

WHOLE = {
    "base": "olmoe",
    "settings": {"capacity": 0.25},
    "data": {"source": "train.jsonl", "examples": 3, "sha256": "ab"},
    "log": [{"step": 1, "nll": 2.0}],
    "seconds": 1.5,
    "of a later release": [1, 2],
}


def test_what_is_written_is_read_and_the_file_says_its_version(tmp_path):
    """The stamp is the file's; unknown fields stay."""
    write_metadata(tmp_path, WHOLE)
    assert read_metadata(tmp_path) == WHOLE
    assert json.loads((tmp_path / "melinoe.json").read_text())["schema_version"] == 1


def test_a_file_without_a_version_is_the_first_one(tmp_path):
    """Checkpoints from before the stamp stay readable."""
    (tmp_path / "melinoe.json").write_text(json.dumps(WHOLE))
    assert read_metadata(tmp_path) == WHOLE


def test_a_file_of_a_newer_release_says_update(tmp_path):
    """Rather than being misread."""
    (tmp_path / "melinoe.json").write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(CheckpointError, match=r"schema_version 2 .* up to 1; update melinoe"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not readable"),
        ("[]", "not a JSON object"),
        ('{"schema_version": "one"}', "'one', which is no version"),
        ('{"schema_version": true}', "no version"),
        ('{"base": 5}', "base is not a text"),
        ('{"settings": []}', "settings is not an object"),
        ('{"data": {"examples": -1}}', "data.examples is not a whole number"),
        ('{"log": {}}', "log is not a list"),
        ('{"log": [{"step": 1}, {"step": 1.5}]}', r"log\[1\].step is not a whole number"),
        ('{"seconds": "long"}', "seconds is not a finite number"),
        ('{"outcome": {}}', "outcome has no 'examples'"),
    ],
)
def test_a_malformed_file_is_named_with_its_field(tmp_path, text, words):
    """One sentence with the path and what is wrong."""
    (tmp_path / "melinoe.json").write_text(text)
    with pytest.raises(CheckpointError, match=words) as error:
        read_metadata(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_an_update_keeps_the_rest_and_refuses_nonsense(tmp_path):
    """A wrong field leaves the file as it was."""
    write_metadata(tmp_path, WHOLE)
    assert update_metadata(tmp_path, license="mit") == {**WHOLE, "license": "mit"}
    with pytest.raises(ValueError, match="license is not a text"):
        update_metadata(tmp_path, license=5)
    assert read_metadata(tmp_path)["license"] == "mit"


def test_a_base_in_a_directory_keeps_its_path_to_itself(tmp_path):
    """Its name and its card's licence are told; where it lies is not."""
    base = tmp_path / "secret" / "olmoe"
    base.mkdir(parents=True)
    assert describe_base(base) == {
        "base": "olmoe",
        "base_model": None,
        "license": None,
        "language": None,
    }
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: [en, el]\n---\n# A model\n")
    about = describe_base(base)
    assert (about["license"], about["language"]) == ("mit", ["en", "el"])
    (base / "README.md").write_text("---\nlicense: [a: {\n---\n")
    assert describe_base(base)["license"] is None


def test_a_base_on_the_hub_is_named_without_its_revision_even_offline():
    """No card can be had here, which says nothing and stops nothing."""
    about = describe_base("nobody/nothing@abc")
    assert (about["base"], about["base_model"]) == ("nobody/nothing@abc", "nobody/nothing")
    assert about["license"] is None


def test_data_is_told_by_the_hash_of_its_bytes(tmp_path):
    """As sha256sum gives it; a directory's files one after the other; no path."""
    rows = [json.dumps({"text": text}) + "\n" for text in ("one", "two")]
    for name, row in zip("ba", rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(row)
    file, folder = tmp_path / "a.jsonl", tmp_path
    about = describe_data(file, load_examples(file))
    assert about["sha256"] == hashlib.sha256(rows[1].encode()).hexdigest()
    assert (about["source"], about["hub"], about["examples"]) == ("a.jsonl", False, 1)
    whole = describe_data(folder, load_examples(folder), "train")
    assert whole["sha256"] == hashlib.sha256((rows[1] + rows[0]).encode()).hexdigest()
    assert (whole["sha256_of"], whole["split"]) == ("files", None)


def test_hub_data_is_told_by_its_examples(tmp_path):
    """Another example, another hash; where the rows stood makes no difference."""
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    one, same, other = (
        describe_data("org/set:main", load_examples(tmp_path / f"{name}.jsonl"), "train")
        for name in "abc"
    )
    assert one == same and one["sha256"] != other["sha256"]
    assert (one["hub"], one["split"], one["sha256_of"]) == (True, "train", "examples")
