"""Recent use follows what is served, forgets at its half-life, and survives its file."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from melinoe.errors import CheckpointError, ModelError, WriteError
from melinoe.predictor import RecentUse
from melinoe.predictor.recent import HALF_LIFE


def recent(layers=1, experts=4):
    return RecentUse(layers, experts, "m")


def test_a_completion_of_one_half_life_ago_counts_half():
    """Seven of expert 0, then eight of expert 1: 0 counts half, and once more of it is above 1."""
    one = recent()
    one.observe(np.array([[7, 0, 0, 0]]))
    for _ in range(int(HALF_LIFE)):
        one.observe(np.array([[0, 3, 0, 0]]))
    later = sum(0.5 ** (n / HALF_LIFE) for n in range(int(HALF_LIFE)))
    assert one.completions == pytest.approx(0.5 + later)
    assert one.used[0] == pytest.approx([0.5, later, 0, 0])


def test_each_completion_counts_alike_however_long_it_was():
    """Ten tokens or a thousand: what is added are shares."""
    one = recent()
    one.observe(np.array([[6, 4, 0, 0]]))
    one.observe(np.array([[0, 0, 1000, 0]]))
    assert one.completions < 2 and one.top([], 1) == [[2]]
    one.observe(np.array([[3, 2, 0, 0]]))
    assert one.top([], 2) == [[0, 2]]


def test_a_layer_that_was_not_used_keeps_what_it_knew():
    """Two layers, one completion of both and one of the first alone: the second still weighs 1."""
    one = recent(layers=2)
    one.observe(np.array([[1, 0, 0, 0], [0, 0, 0, 1]]))
    one.observe(np.array([[1, 0, 0, 0], [0, 0, 0, 0]]))
    assert one.used[1].tolist() == [0, 0, 0, 1] and one.completions > 1.5
    before = one.used.copy()
    one.observe(np.zeros((2, 4)))  # a completion of one token: nothing was decoded
    assert np.array_equal(one.used, before)


def test_top_names_only_what_was_used_the_most_used_first():
    """Uses 1, 3, 0, 2: experts 1, 3, 0, whatever the prompt; without any, nothing."""
    one = recent()
    assert one.top([], 2) == [[]]
    one.observe(np.array([[1, 3, 0, 2]]))
    assert one.top([5], 2) == [[1, 3]]
    assert one.top([6], 4) == [[1, 3, 0]]


@pytest.mark.parametrize("wrong", [np.zeros((2, 4)), np.array([[1, -1, 0, 0]]), [[np.nan] * 4]])
def test_uses_that_cannot_be_are_the_callers_mistake(wrong):
    """Another shape, less than nothing, no number."""
    one = recent()
    with pytest.raises(ValueError, match="usage"):
        one.observe(wrong)
    assert not one.used.any()


def test_a_file_goes_on_as_if_nothing_had_happened(tmp_path):
    """What the next completion makes of it; nothing else is left beside it."""
    rng = np.random.default_rng(0)
    one = recent(layers=3, experts=8)
    for _ in range(7):
        one.observe(rng.integers(0, 9, (3, 8)))
    path = tmp_path / "new folder" / "recent"
    one.update(path)
    again = RecentUse.load(path)
    assert again.fingerprint == "m"
    uses = rng.integers(0, 9, (3, 8))
    for each in (one, again):
        each.observe(uses)
    assert again.used == pytest.approx(one.used, abs=1e-6)
    assert again.top([], 8) == one.top([], 8)
    assert [file.name for file in path.parent.iterdir()] == ["recent"]


def test_a_place_that_cannot_be_written_to_is_said(tmp_path):
    """A file where a folder should be."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="another place"):
        recent().update(tmp_path / "file" / "recent")


def test_no_file_there_is_said(tmp_path):
    """One sentence, with the path."""
    with pytest.raises(CheckpointError, match=r"absent.*check the path"):
        RecentUse.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("other", "words"),
    [(RecentUse(1, 4, "other"), "not on other"), (recent(2), "not on m .2 of 4")],
)
def test_another_models_file_is_refused_and_left_alone(tmp_path, other, words):
    """By fingerprint, and by shape."""
    recent().update(tmp_path / "recent")
    before = (tmp_path / "recent").read_bytes()
    with pytest.raises(ModelError, match=words):
        other.update(tmp_path / "recent")
    assert (tmp_path / "recent").read_bytes() == before


def rewrite(path, change):
    """Save the file again with *change* made to (header, arrays, metadata)."""
    blob = path.read_bytes()
    (length,) = struct.unpack_from("<Q", blob)
    metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
    header, arrays = json.loads(metadata["header"]), load_file(path)
    change(header, arrays, metadata)
    save_file(arrays, path, metadata={**metadata, "header": json.dumps(header)})


DAMAGES = {
    "another format": lambda h, a, m: m.update(format="melinoe-trace"),
    "an earlier version": lambda h, a, m: h.update(version=0),
    "a later version": lambda h, a, m: h.update(version=2),
    "no model": lambda h, a, m: h.update(fingerprint=None),
    "no table": lambda h, a, m: a.pop("used"),
    "another table": lambda h, a, m: a.update(weight=a["used"].copy()),
    "another shape": lambda h, a, m: a.update(used=a["used"][0]),
    "no experts": lambda h, a, m: a.update(used=a["used"][:, :0]),
    "another type": lambda h, a, m: a.update(used=a["used"].astype(np.float64)),
    "no number": lambda h, a, m: a["used"].__setitem__((0, 0), np.nan),
    "a negative use": lambda h, a, m: a["used"].__setitem__((0, 0), -1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, damage):
    """Whatever is wrong with the file, one sentence that says how to go on."""
    path = tmp_path / "recent"
    one = recent()
    one.observe(np.array([[1, 2, 0, 0]]))
    one.update(path)
    rewrite(path, DAMAGES[damage])
    with pytest.raises(CheckpointError, match="begin another one"):
        RecentUse.load(path)


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_a_torn_file_is_refused(tmp_path, length):
    """Cut anywhere: in the length, in the header, in the table."""
    path = tmp_path / "recent"
    one = recent()
    one.observe(np.array([[1, 2, 0, 0]]))
    one.update(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="begin another one"):
        RecentUse.load(path)
