"""Sections of a benchmark that fail, hang or take their process along cost only themselves."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

GPU = Path(__file__).parents[3] / "benchmarks" / "gpu"
# A worker that does what its sections are called.
WORKER = """
import json, os, sys, time
lines = open(sys.argv[1], "a", buffering=1)
def tell(event, **more):
    lines.write(json.dumps({"event": event} | more) + "\\n")
for name in sys.argv[2:]:
    tell("begin", section=name)
    if name == "hangs":
        tell("row", section="decode", of=name)
        time.sleep(600)
    if name == "dies":
        os._exit(3)
    if name == "fails":
        tell("failed", section=name, reason="as asked")
        continue
    tell("row", section="decode", of=name, process=os.getpid())
    tell("end", section=name, seconds=0.1)
"""


@pytest.fixture(scope="module")
def supervise():
    spec = importlib.util.spec_from_file_location("supervise", GPU / "supervise.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(supervise, folder, names, minutes=5.0, program=WORKER):
    seen = []
    found = supervise.Supervisor(
        dict.fromkeys(names, 3.0),
        lambda left, lines: [sys.executable, "-c", program, str(lines), *left],
        lambda events: seen.append(len(events)),
        time.monotonic() + 60 * minutes,
        folder,
    ).run()
    assert not seen or seen[-1] == len(found)  # what is known was handed on to the end
    return found


def test_others_run_when_a_section_fails_hangs_or_dies(supervise, tmp_path):
    """Each of the three is named with its reason; rows from before a hang are kept."""
    names = ["first", "fails", "hangs", "second", "dies", "third"]
    events = run(supervise, tmp_path, names)
    assert [e["section"] for e in events if e["event"] == "end"] == ["first", "second", "third"]
    failed = {e["section"]: e["reason"] for e in events if e["event"] == "failed"}
    assert failed == {
        "fails": "as asked",
        "hangs": "did not end within 3 s",
        "dies": "its process ended with code 3",
    }
    rows = [e for e in events if e["event"] == "row"]
    assert [row["of"] for row in rows] == ["first", "hangs", "second", "third"]
    assert len({row["process"] for row in rows if "process" in row}) == 3


def test_time_that_is_over_is_said_of_each_section_left(supervise, tmp_path):
    """Nothing is begun any more."""
    events = run(supervise, tmp_path, ["first", "second"], minutes=0.0)
    assert [e["reason"] for e in events] == ["no time left", "no time left"]


def test_a_worker_that_never_begins_is_not_tried_for_ever(supervise, tmp_path):
    """An import that fails, say."""
    events = run(supervise, tmp_path, ["first", "second"], program="raise SystemExit(7)")
    assert [e["reason"] for e in events] == ["no worker starts, code 7"] * 2
