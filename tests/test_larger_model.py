"""The study on a larger model, as far as it goes without a GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu" / "larger_model.sh"


@pytest.fixture
def plan(monkeypatch):
    """`benchmarks/study/plan.py` as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS / "study")
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    import plan

    yield plan
    del sys.modules["plan"]


def test_every_run_that_the_script_names_is_in_the_plan_with_its_control(plan):
    """A name that the plan does not have would run nothing, in silence."""
    named = set(re.findall(r'--name (?:"([^"]+)"|(\w+))', SCRIPT.read_text()))
    names = {quoted or bare for quoted, bare in named}
    runs = {run.name: run for run in plan.all_runs((0,))}
    assert len(names) == 2 and names <= runs.keys()
    assert {runs[name].plain for name in names} == {"plain"} <= names


def test_without_text_to_train_on_the_script_says_so_and_runs_nothing(tmp_path):
    """One line, before anything is written."""
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")], capture_output=True, text=True, env={}
    )
    assert done.returncode != 0 and "name the directory of text" in done.stderr
    assert not (tmp_path / "out").exists()
