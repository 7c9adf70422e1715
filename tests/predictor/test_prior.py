"""The prior follows what is served, forgets at its half-life, and stays small."""

import json
import stat
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from melinoe.errors import CheckpointError, DataError, ModelError, WriteError
from melinoe.predictor import Prior, PriorSettings


def prior(layers=1, experts=4, **settings):
    return Prior(layers, experts, "m", PriorSettings(**settings))


FLAT = np.full((1, 4), 0.25)


def corrected(one, key="", predicted=FLAT):
    """By how much each expert's probability is multiplied, up to one factor a layer."""
    found = one.adjust(predicted, key) / predicted
    return found / found[:, -1:]


def test_a_request_of_one_half_life_ago_counts_half():
    """Half-life 1, strength 2: s = (.5, 1, 0, 0), q = 1.5 x (1/4), known = .5 + 3.5 / 128."""
    one = prior(half_life=1.0, strength=2.0)
    one.observe("", np.array([[7, 0, 0, 0]]), FLAT)
    one.observe("", np.array([[0, 3, 0, 0]]), FLAT)
    assert one.requests("") == pytest.approx(1.5)
    known = 2.0 * 0.25 + (1.5 + 2.0) / (32 * 4)
    scores = 0.25 * (np.array([[0.5, 1, 0, 0]]) + known) / (1.5 * 0.25 + known)
    assert one.adjust(FLAT, "") == pytest.approx(scores / scores.sum())


def test_each_completion_counts_alike_however_long_it_was():
    """Ten tokens or a thousand: what is added are shares."""
    short, long = prior(), prior()
    short.observe("", np.array([[6, 4, 0, 0]]), FLAT)
    long.observe("", np.array([[600, 400, 0, 0]]), FLAT)
    assert np.array_equal(short.adjust(FLAT, ""), long.adjust(FLAT, ""))


def test_a_layer_that_was_not_used_keeps_what_it_knew():
    """Two layers, one request of both and one of the first alone: the second still weighs 1."""
    one = prior(layers=2, half_life=1.0, strength=1.0)
    flat = np.full((2, 4), 0.25)
    one.observe("", np.array([[1, 0, 0, 0], [0, 0, 0, 1]]), flat)
    before = one.adjust(flat, "")
    one.observe("", np.array([[1, 0, 0, 0], [0, 0, 0, 0]]), flat)
    after = one.adjust(flat, "")
    assert np.array_equal(after[1], before[1]) and after[0, 0] > before[0, 0]
    one.observe("", np.zeros((2, 4)))  # a completion of one token: nothing was decoded
    assert one.requests("") == pytest.approx(1.5)


def test_the_longest_traffic_weighs_no_more_than_the_half_life_allows():
    """The weights are a geometric series: 1 / (1 - 2 ** (-1 / half_life)) at most."""
    one = prior(half_life=3.0)
    for _ in range(200):
        one.observe("", np.array([[1, 1, 0, 0]]))
    assert one.requests("") == pytest.approx(1 / (1 - 0.5 ** (1 / 3)))


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


def test_an_unseen_key_changes_no_prediction():
    """The learned distribution comes back as it went in."""
    predicted = np.array([[0.4, 0.3, 0.2, 0.1]])
    one = prior()
    one.observe("ada", np.array([[0, 0, 0, 5]]), predicted)
    assert one.adjust(predicted, "bob") == pytest.approx(predicted)


def test_a_predictor_that_was_right_is_left_alone():
    """Served as predicted, five times, each prompt another: the sixth prediction is kept."""
    rng = np.random.default_rng(0)
    one = prior()
    for _ in range(5):
        said = rng.dirichlet(np.ones(4))[None]
        one.observe("", said * 100, said)
    predicted = np.array([[0.1, 0.2, 0.3, 0.4]])
    assert one.adjust(predicted, "") == pytest.approx(predicted)


def test_what_nobody_predicted_corrects_nothing():
    """A prior that stood alone and then gets a predictor begins to correct with its first one."""
    predicted = np.array([[0.1, 0.2, 0.3, 0.4]])
    one = prior()
    one.observe("", np.array([[9, 0, 0, 0]]))
    assert one.adjust(predicted, "") == pytest.approx(predicted)
    assert one.top("", 1) == [[0]]
    one.observe("", np.array([[9, 0, 0, 0]]), predicted)
    ratio = corrected(one, predicted=predicted)
    assert ratio[0, 0] > 1.5 and (ratio[0, 1:] > ratio[0, 0]).sum() == 0


def test_switched_off_it_neither_learns_nor_speaks_and_forgets_nothing():
    """Off: no new key, predictions untouched. On again: what it knew is there."""
    one, predicted = prior(), np.array([[0.4, 0.3, 0.2, 0.1]])
    one.observe("ada", np.array([[0, 0, 0, 1]]), FLAT)
    one.enabled = False
    one.observe("ada", np.array([[1, 0, 0, 0]]))
    one.observe("bob", np.array([[1, 0, 0, 0]]))
    assert one.top("ada", 1) == [[]]
    assert one.adjust(predicted, "ada") == pytest.approx(predicted)
    one.enabled = True
    assert one.top("ada", 1) == [[3]] and one.keys() == ["ada"]


def test_it_holds_so_many_keys_and_lets_the_longest_unused_go():
    """Two keys at most: reading Ada keeps her, and Bob leaves for Cyd."""
    one = prior(max_keys=2)
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
    """Another shape, less than nothing, no number; of uses and of predictions."""
    one = prior()
    with pytest.raises(ValueError, match="usage"):
        one.observe("", wrong)
    with pytest.raises(ValueError, match="predicted"):
        one.observe("", FLAT, wrong)
    assert one.keys() == []


@pytest.mark.parametrize("wrong", [{"half_life": 0}, {"strength": -1}, {"max_keys": 0}])
def test_settings_that_make_no_sense_are_the_callers_mistake(wrong):
    """They are named."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PriorSettings(**wrong)


def test_a_saved_prior_goes_on_as_if_nothing_had_happened(tmp_path):
    """Keys in their order, settings, and what the next request makes of them."""
    rng = np.random.default_rng(0)
    one = prior(layers=3, experts=8, half_life=5.0, strength=0.5, max_keys=3)
    for number in range(7):
        one.observe(f"user {number % 4} é\n", rng.integers(0, 9, (3, 8)), rng.random((3, 8)))
    path = tmp_path / "new folder" / "prior.safetensors"
    one.save(path)
    again = Prior.load(path)
    assert again.keys() == one.keys() and len(again.keys()) == 3
    assert again.settings == one.settings and again.fingerprint == "m" and again.enabled
    uses, flat = rng.integers(0, 9, (3, 8)), np.full((3, 8), 1 / 8)
    for each in (one, again):
        each.observe("user 0 é\n", uses, flat)
    found = again.adjust(flat, "user 0 é\n")
    assert found == pytest.approx(one.adjust(flat, "user 0 é\n"), abs=1e-6)
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
    with pytest.raises(DataError, match=r"absent.*check the path"):
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
    "a later version": lambda h, a, m: h.update(version=2),
    "no keys": lambda h, a, m: h.pop("keys"),
    "a key twice": lambda h, a, m: h.update(keys=["ada", "ada"]),
    "a key too few": lambda h, a, m: h.update(keys=["ada"]),
    "more keys than it may hold": lambda h, a, m: h.update(max_keys=1),
    "a key that is a number": lambda h, a, m: h.update(keys=["ada", 3]),
    "no model": lambda h, a, m: h.update(fingerprint=None),
    "a half-life of nothing": lambda h, a, m: h.update(half_life=0),
    "a strength in words": lambda h, a, m: h.update(strength="much"),
    "half a key": lambda h, a, m: h.update(max_keys=2.5),
    "no table": lambda h, a, m: a.pop("weight"),
    "another shape": lambda h, a, m: a.update(weight=a["weight"][:, :0]),
    "another shape of predictions": lambda h, a, m: a.update(expected=a["expected"][:, :, :3]),
    "another type": lambda h, a, m: a.update(total=a["total"].astype(np.float64)),
    "no number": lambda h, a, m: a["total"].__setitem__((0, 0, 0), np.nan),
    "a negative use": lambda h, a, m: a["total"].__setitem__((0, 0, 0), -1),
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


@pytest.mark.parametrize("length", [0, 7, 60, 300])
def test_a_torn_prior_is_refused(tmp_path, length):
    """Cut anywhere: in the length, in the header, in the tables."""
    path = tmp_path / "prior"
    one = prior()
    one.observe("ada", np.array([[1, 2, 0, 0]]))
    one.save(path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="begin another one"):
        Prior.load(path)
