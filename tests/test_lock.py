"""One writer at a time: a second run is told at once, and nobody loses what another has learned."""

import os
import time

import pytest
from typer.testing import CliRunner

from melinoe.cli import output
from melinoe.cli.app import app
from melinoe.errors import CheckpointError, OutputExistsError, WriteError
from melinoe.lock import held

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
        time.sleep(600)


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
    ["prune", "NOT_THERE", "--data", "NOT_THERE"],
    ["trace", "NOT_THERE", "--data", "NOT_THERE", "--slots", "1"],
    ["import-trace", "NOT_THERE", "--num-experts", "2"],
    ["predictor", "fit", "NOT_THERE"],
    ["report", "NOT_THERE"],
    ["plan", "--cards"],
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
    monkeypatch.setattr(output, "quiet", lambda: None)  # it would silence the tests that follow
    done = CliRunner().invoke(app, ["merge", "NOT_THERE", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, CheckpointError)
