"""The recipes run from nothing but text, at a size for tests."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """`tiny_olmoe.py` as a module, on a clock of which a test can turn the hands."""
    spec = importlib.util.spec_from_file_location("tiny_olmoe", RECIPES / "tiny_olmoe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ahead_s = 0
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + module.ahead_s)
    monkeypatch.setattr(module, "time", clock)
    return module


def run(recipe, monkeypatch, out: Path) -> None:
    """Four steps of two sequences of sixteen tokens."""
    data = out.with_name("data")
    data.mkdir(exist_ok=True)
    lines = [json.dumps({"text": f"word {n} and word {n + 1} make a line"}) for n in range(60)]
    (data / "words.jsonl").write_text("\n".join(lines))
    arguments = {
        "data": data, "out": out, "tokens": 128, "vocab-size": 300, "layers": 1, "experts": 4,
        "top-k": 2, "hidden-size": 16, "intermediate-size": 8, "heads": 2, "context": 16,
        "batch": 2,
    }  # fmt: skip
    argv = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["tiny_olmoe.py", *argv])
    recipe.main()


def test_the_seconds_of_a_run_that_was_resumed_are_those_of_all_its_parts(
    recipe, monkeypatch, tmp_path
):
    """Stopped in the third of four steps, each of 1,000 s: two are kept, two follow at once."""
    out = tmp_path / "out"
    real, steps = recipe.PretrainTrainer.training_step, []

    def slow(self, *arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        recipe.ahead_s += 1000
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.PretrainTrainer, "training_step", slow)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, monkeypatch, out)
    assert not (out / "training.json").exists()
    run(recipe, monkeypatch, out)
    record = json.loads((out / "training.json").read_text())
    assert 2000 <= record["seconds"] < 2200
    assert record["steps"] == 4
