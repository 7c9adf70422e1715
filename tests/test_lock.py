"""One writer at a time: a second run is told at once, and nobody loses what another has learned."""

import os
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from melinoe.cli.app import app
from melinoe.errors import CheckpointError, OutputExistsError, WriteError
from melinoe.lock import held
from melinoe.predictor import Prior

FINGERPRINT = "0" * 64


def in_a_process(function, *arguments):
    """Call *function* in a process of its own; its number."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def hold_until_killed(path, begun):
    with held(path):
        begun.touch()
        time.sleep(60)


@pytest.fixture
def other(tmp_path):
    """A process that writes to ``out``."""
    child = in_a_process(hold_until_killed, tmp_path / "out", tmp_path / "begun")
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    yield child
    os.kill(child, 9)
    os.waitpid(child, 0)


COMMANDS = [
    ["demo"],
    ["finetune", "NOT_THERE", "--data", "NOT_THERE"],
    ["merge", "NOT_THERE"],
    ["own-text", "NOT_THERE", "--slots", "1"],
    ["trace", "NOT_THERE", "--data", "NOT_THERE", "--slots", "1"],
    ["import-trace", "NOT_THERE", "--num-experts", "2"],
    ["predictor", "fit", "NOT_THERE"],
    ["report", "NOT_THERE"],
    ["plan", "NOT_THERE", "--limits"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one[0])
def test_a_second_run_is_told_at_once(tmp_path, other, command):
    """Before it looks at anything else, and with the process that it would have to wait for."""
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, OutputExistsError), done.output
    assert f"another run (process {other} on " in str(done.exception)
    assert "choose another place" in str(done.exception)


def test_a_lock_that_a_killed_run_left_stops_nobody(tmp_path):
    """The file is there, its process is not; at the end the file is gone too."""
    child = in_a_process(hold_until_killed, tmp_path / "out", tmp_path / "begun")
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert (tmp_path / ".out.lock").exists()
    with held(tmp_path / "out"):
        pass
    assert not (tmp_path / ".out.lock").exists()


def test_a_run_that_fails_leaves_no_lock(tmp_path):
    """The command's own error, and an empty directory."""
    done = CliRunner().invoke(app, ["merge", "NOT_THERE", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, CheckpointError)
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_refused(tmp_path):
    """Before the model is looked at."""
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["merge", "NOT_THERE", "--out", str(tmp_path / "file" / "out")])
    assert isinstance(done.exception, WriteError)


def test_the_other_processes_of_a_run_take_no_lock(tmp_path, other, monkeypatch):
    """The first one holds it for all."""
    monkeypatch.setenv("RANK", "1")
    done = CliRunner().invoke(app, ["merge", "NOT_THERE", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, CheckpointError)


# --- priors -------------------------------------------------------------------------------------


def usage(*experts):
    """One layer of four experts, each named one used once."""
    return np.bincount(experts, minlength=4)[None]


def test_two_that_learn_at_once_lose_nothing(tmp_path):
    """Both read the same file; the second to write adds to the first, as if it had come after."""
    start = Prior(1, 4, FINGERPRINT)
    start.observe("a", usage(0))
    start.update(tmp_path / "prior")
    one, other = (Prior.load(tmp_path / "prior") for _ in range(2))
    one.observe("a", usage(1))
    one.observe("b", usage(3))
    other.observe("a", usage(2))
    other.observe("a", usage(2, 3))
    one.update(tmp_path / "prior")
    other.update(tmp_path / "prior")
    expected = Prior(1, 4, FINGERPRINT)
    for key, used in (("a", (0,)), ("a", (1,)), ("b", (3,)), ("a", (2,)), ("a", (2, 3))):
        expected.observe(key, usage(*used))
    found = Prior.load(tmp_path / "prior")
    assert found.keys() == expected.keys() == other.keys()
    for key in ("a", "b"):
        np.testing.assert_allclose(found._known[key], expected._known[key], rtol=1e-6)
    other.update(tmp_path / "prior")  # nothing new
    again = Prior.load(tmp_path / "prior")
    np.testing.assert_allclose(again._known["a"], found._known["a"], rtol=1e-6)


def learn(path, key):
    for _ in range(10):
        prior = Prior.load(path)
        prior.observe(key, usage(1))
        prior.update(path)


def test_many_writers_lose_no_request(tmp_path):
    """Four processes, ten requests of each: all forty count."""
    Prior(1, 4, FINGERPRINT).save(tmp_path / "prior")
    children = [in_a_process(learn, tmp_path / "prior", f"user {n}") for n in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    alone = Prior(1, 4, FINGERPRINT)
    for _ in range(10):
        alone.observe("", usage(1))
    found = Prior.load(tmp_path / "prior")
    assert sorted(found.keys()) == [f"user {n}" for n in range(4)]
    for key in map("user {}".format, range(4)):
        assert found.requests(key) == pytest.approx(alone.requests(""), rel=1e-6)
    assert [one.name for one in tmp_path.iterdir()] == ["prior"]


def test_a_file_that_became_another_models_is_left_alone(tmp_path):
    """Somebody removed it and began one of another model meanwhile."""
    mine = Prior(1, 4, FINGERPRINT)
    mine.observe("", usage(1))
    Prior(1, 4, "1" * 64).save(tmp_path / "prior")
    before = (tmp_path / "prior").read_bytes()
    with pytest.raises(Exception, match="learned on model"):
        mine.update(tmp_path / "prior")
    assert (tmp_path / "prior").read_bytes() == before
