"""Limit the time of each test on a GPU, and write results as they come."""

import json
import signal

import pytest

# Compiling a model's step takes up to 100 s; nothing else takes long.
SECONDS = 150


def pytest_addoption(parser):
    parser.addoption("--gpu-results", help="file that gets a JSON line for each test that ended")


@pytest.fixture(autouse=True)
def limit_of_time():
    """End a test that hangs, so that the others are still run."""

    def strike(*_):
        raise TimeoutError(f"the test did not end within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, strike)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report):
    if _results is None or (report.when != "call" and report.passed):
        return
    row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
    if report.failed:
        row["said"] = str(report.longrepr)[-3000:]
    with open(_results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


_results = None


def pytest_configure(config):
    global _results
    # Under xdist the first process is told of every test; a worker must not write it again.
    _results = None if hasattr(config, "workerinput") else config.getoption("--gpu-results", None)
