"""The prior follows what is served, forgets at its half-life, and stays small."""

import json
import stat
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from melinoe.errors import CheckpointError, ModelError, WriteError
from melinoe.predictor import Prior
from melinoe.predictor import prior as module
from melinoe.predictor.prior import HALF_LIFE


def prior(layers=1, experts=4):
    return Prior(layers, experts, "m")


def test_a_request_of_one_half_life_ago_counts_half():
    """Seven of expert 0, then eight of expert 1: 0 counts half, and once more of it is above 1."""
    one = prior()
    one.observe("", np.array([[7, 0, 0, 0]]))
    for _ in range(int(HALF_LIFE)):
        one.observe("", np.array([[0, 3, 0, 0]]))
    later = sum(0.5 ** (n / HALF_LIFE) for n in range(int(HALF_LIFE)))
    assert one.requests("") == pytest.approx(0.5 + later)
    assert one._known[""][0] == pytest.approx([0.5, later, 0, 0])


def test_each_completion_counts_alike_however_long_it_was():
    """Ten tokens or a thousand: what is added are shares."""
    one = prior()
    one.observe("", np.array([[6, 4, 0, 0]]))
    one.observe("", np.array([[0, 0, 1000, 0]]))
    assert one.requests("") < 2 and one.top("", 1) == [[2]]
    one.observe("", np.array([[3, 2, 0, 0]]))
    assert one.top("", 2) == [[0, 2]]


def test_a_layer_that_was_not_used_keeps_what_it_knew():
    """Two layers, one request of both and one of the first alone: the second still weighs 1."""
    one = prior(layers=2)
    one.observe("", np.array([[1, 0, 0, 0], [0, 0, 0, 1]]))
    one.observe("", np.array([[1, 0, 0, 0], [0, 0, 0, 0]]))
    assert one._known[""][1].tolist() == [0, 0, 0, 1] and one.requests("") > 1.5
    one.observe("new", np.zeros((2, 4)))  # a completion of one token: nothing was decoded
    assert one.keys() == [""]


def test_the_longest_traffic_weighs_no_more_than_the_half_life_allows():
    """The weights are a geometric series: 1 / (1 - 2 ** (-1 / HALF_LIFE)) at most."""
    one = prior()
    for _ in range(400):
        one.observe("", np.array([[1, 1, 0, 0]]))
    assert one.requests("") == pytest.approx(1 / (1 - 0.5 ** (1 / HALF_LIFE)))


def test_top_names_only_what_was_used_the_most_used_first():
    """Uses 1, 3, 0, 2: experts 1, 3, 0; a new key gets nothing."""
    one = prior()
    one.observe("ada", np.array([[1, 3, 0, 2]]))
    assert one.top("ada", 2) == [[1, 3]]
    assert one.top("ada", 4) == [[1, 3, 0]]
    assert one.top("bob", 2) == [[]]


def test_keys_are_kept_apart():
    """What Ada uses says nothing of Bob."""
    one = prior()
    one.observe("ada", np.array([[1, 0, 0, 0]]))
    one.observe("bob", np.array([[0, 0, 0, 1]]))
    assert one.top("ada", 1) == [[0]] and one.top("bob", 1) == [[3]]
    one.reset("ada")
    assert one.top("ada", 1) == [[]] and one.top("bob", 1) == [[3]]
    one.reset("nobody")
    one.reset()
    assert one.keys() == [] and one.requests("bob") == 0


def test_it_holds_so_many_keys_and_lets_the_longest_unused_go(monkeypatch):
    """Two keys at most: reading Ada keeps her, and Bob leaves for Cyd."""
    monkeypatch.setattr(module, "MAX_KEYS", 2)
    one = prior()
    for key in ("ada", "bob"):
        one.observe(key, np.array([[1, 0, 0, 0]]))
    one.top("ada", 1)
    one.observe("cyd", np.array([[1, 0, 0, 0]]))
    assert one.keys() == ["ada", "cyd"]
    for number in range(100):
        one.top(f"reader {number}", 1)  # asking makes no key
    assert one.keys() == ["ada", "cyd"]


@pytest.mark.parametrize("wrong", [np.zeros((2, 4)), np.array([[1, -1, 0, 0]]), [[np.nan] * 4]])
def test_uses_that_cannot_be_are_the_callers_mistake(wrong):
    """Another shape, less than nothing, no number."""
    one = prior()
    with pytest.raises(ValueError, match="usage"):
        one.observe("", wrong)
    assert one.keys() == []


def test_a_saved_prior_goes_on_as_if_nothing_had_happened(tmp_path):
    """Keys in their order, and what the next request makes of them."""
    rng = np.random.default_rng(0)
    one = prior(layers=3, experts=8)
    for number in range(7):
        one.observe(f"user {number % 4} é\n", rng.integers(0, 9, (3, 8)))
    path = tmp_path / "new folder" / "prior.safetensors"
    one.save(path)
    again = Prior.load(path)
    assert again.keys() == one.keys() and len(again.keys()) == 4
    assert again.fingerprint == "m"
    uses = rng.integers(0, 9, (3, 8))
    for each in (one, again):
        each.observe("user 0 é\n", uses)
    for key, used in one._known.items():
        assert again._known[key] == pytest.approx(used, abs=1e-6)
    assert again.top("user 0 é\n", 8) == one.top("user 0 é\n", 8)
    assert [file.name for file in path.parent.iterdir()] == ["prior.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # it names users


def test_an_empty_prior_can_be_saved(tmp_path):
    """Before the first request there are no keys; its shape is kept."""
    prior(layers=2, experts=8).save(tmp_path / "p")
    again = Prior.load(tmp_path / "p")
    assert again.keys() == [] and (again.num_layers, again.num_experts) == (2, 8)


def test_a_place_that_cannot_be_written_to_is_said(tmp_path):
    """A file where a folder should be."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="another place"):
        prior().save(tmp_path / "file" / "prior")


def test_no_prior_there_is_said(tmp_path):
    """One sentence, with the path."""
    with pytest.raises(CheckpointError, match=r"absent.*check the path"):
        Prior.load(tmp_path / "absent")


def test_another_models_prior_is_refused():
    """By fingerprint, and by shape."""
    one = prior()
    one.check_model("m", 1, 4)
    with pytest.raises(ModelError, match="not on other"):
        one.check_model("other", 1, 4)
    with pytest.raises(ModelError, match="2 of 4"):
        one.check_model("m", 2, 4)


def rewrite(path, change):
    """Save the file again with *change* made to (header, arrays)."""
    blob = path.read_bytes()
    (length,) = struct.unpack_from("<Q", blob)
    metadata = json.loads(blob[8 : 8 + length])["__metadata__"]
    header, arrays = json.loads(metadata["header"]), load_file(path)
    change(header, arrays, metadata)
    save_file(arrays, path, metadata={**metadata, "header": json.dumps(header)})


DAMAGES = {
    "another format": lambda h, a, m: m.update(format="melinoe-trace"),
    "an earlier version": lambda h, a, m: h.update(version=1),
    "a later version": lambda h, a, m: h.update(version=3),
    "no keys": lambda h, a, m: h.pop("keys"),
    "a key twice": lambda h, a, m: h.update(keys=["ada", "ada"]),
    "a key too few": lambda h, a, m: h.update(keys=["ada"]),
    "more keys than it may hold": lambda h, a, m: h.update(keys=list(map(str, range(2000)))),
    "a key that is a number": lambda h, a, m: h.update(keys=["ada", 3]),
    "no model": lambda h, a, m: h.update(fingerprint=None),
    "no table": lambda h, a, m: a.pop("used"),
    "another table": lambda h, a, m: a.update(weight=a["used"].copy()),
    "another shape": lambda h, a, m: a.update(used=a["used"][:, 0]),
    "no experts": lambda h, a, m: a.update(used=a["used"][:, :, :0]),
    "another type": lambda h, a, m: a.update(used=a["used"].astype(np.float64)),
    "no number": lambda h, a, m: a["used"].__setitem__((0, 0, 0), np.nan),
    "a negative use": lambda h, a, m: a["used"].__setitem__((0, 0, 0), -1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_prior_is_refused(tmp_path, damage):
    """Whatever is wrong with the file, one sentence that says how to go on."""
    path = tmp_path / "prior"
    one = prior()
    for key in ("ada", "bob"):
        one.observe(key, np.array([[1, 2, 0, 0]]))
    one.save(path)
    rewrite(path, DAMAGES[damage])
    with pytest.raises(CheckpointError, match="begin another one"):
        Prior.load(path)


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_a_torn_prior_is_refused(tmp_path, length):
    """Cut anywhere: in the length, in the header, in the tables."""
    path = tmp_path / "prior"
    one = prior()
    one.observe("ada", np.array([[1, 2, 0, 0]]))
    one.save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="begin another one"):
        Prior.load(path)
