"""Directories that are filled beside what they will become: gone on failure, SIGTERM, next time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from melinoe.whole_file import unfinished

WORK = """
import signal, sys, time
from pathlib import Path
from melinoe.whole_file import unfinished
# A shell's background job is started deaf to Ctrl-C, and so is what it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
with unfinished(Path(sys.argv[1])) as directory:
    (directory / "half").write_text("a model, half of it")
    print("there", flush=True)
    time.sleep(600)
"""


def start(path):
    """A process that is in the middle of its work on *path*."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "there\n"
    return process


def end(process, number):
    """Send it a signal, wait, and return how it ended."""
    process.send_signal(number)
    code = process.wait(timeout=300)
    process.stdout.close()
    return code


def names(directory):
    """What lies there, hidden or not."""
    return sorted(one.name for one in directory.iterdir())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_process_asked_to_end_leaves_nothing(tmp_path, number, code):
    """SIGTERM, which alone would end Python on the spot, and Ctrl-C."""
    process = start(tmp_path / "out")
    assert len(names(tmp_path)) == 1
    assert end(process, number) == code
    assert names(tmp_path) == []


def test_what_a_killed_process_left_goes_when_the_work_is_done_again(tmp_path):
    """Its own leftovers alone: not those of another output, nor of a process that still works."""
    assert end(start(tmp_path / "out"), signal.SIGKILL) == -signal.SIGKILL
    end(start(tmp_path / "out.control"), signal.SIGKILL)
    (tmp_path / ".out.original").mkdir()
    living = start(tmp_path / "out")
    before = names(tmp_path)
    assert len(before) == 3  # the killed one's went when the living one began
    with unfinished(tmp_path / "out") as directory:
        assert names(tmp_path) == sorted([*before, directory.name])
    assert end(living, signal.SIGTERM) == 128 + signal.SIGTERM
    with unfinished(tmp_path / "out.control"):
        pass
    assert names(tmp_path) == [".out.original"]


def test_a_renamed_directory_stays_and_a_failed_one_goes(tmp_path):
    """As a checkpoint that is whole takes its name; signals are heard by whom they were before."""
    with unfinished(tmp_path / "out") as directory:
        (directory / "file").touch()
        os.replace(directory, tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]
    with pytest.raises(ZeroDivisionError), unfinished(tmp_path / "other"):
        _ = 1 / 0
    assert names(tmp_path) == ["out"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_somebody_who_listens_to_sigterm_already_is_not_replaced(tmp_path):
    """A server's own handler, or a run's that saves its state, is called; the work goes on."""
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with unfinished(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert len(names(tmp_path)) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1] and names(tmp_path) == []
