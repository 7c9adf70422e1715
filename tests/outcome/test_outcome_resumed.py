"""A run that is killed once its weights are written is completed by the command with --resume."""

import json
import os
from functools import partial

import pytest
from data_rows import write
from small_olmoe import write_checkpoint
from typer.testing import CliRunner

from melinoe.checkpoint import read_metadata
from melinoe.cli.app import app
from melinoe.config import OutcomeSettings
from melinoe.errors import OutputExistsError, TrainingError

STEPS = (
    *("--steps", 2, "--batch-size", 4, "--learning-rate", 0.01, "--save-every", 1),
    *("--lora-rank", 2, "--lambda-replay", 0, "--against", "control"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, examples, and what a run that nothing disturbs makes of them."""
    place = tmp_path_factory.mktemp("place")
    write_checkpoint(place / "base")
    for name, first, count in (("train", 2, 16), ("held", 3, 8)):
        rows = [
            {"prompt": f"w{first + i} ", "completion": f"w{9 + i} w4 w{3 + i} w{20 - i}"}
            for i in range(count)
        ]
        write(place / f"{name}.jsonl", *rows)
    with pytest.MonkeyPatch.context() as patch:
        measure_little(patch)
        finetune(place, place / "quiet")
    return place


@pytest.fixture(autouse=True)
def little(monkeypatch):
    measure_little(monkeypatch)


def measure_little(patch):
    """Three short completions of each model are enough here, and no figure is looked at."""
    small = partial(OutcomeSettings, prompts=3, max_new_tokens=4)
    patch.setattr("melinoe.outcome.record.OutcomeSettings", small)
    patch.setattr("melinoe.report.card.figures_of", lambda records: [])


def finetune(place, out, *more):
    common = ("--data", place / "train.jsonl", "--eval-data", place / "held.jsonl")
    arguments = ("finetune", place / "base", *common, "--out", out, *STEPS, *more)
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)


def killed(place, out, where, times):
    """Run the command, and end it as a lost machine would when *where* is called so often."""
    module, _, name = where.rpartition(".")
    found = __import__(module, fromlist=[name])
    real, calls = getattr(found, name), []

    def last(*arguments, **more):
        calls.append(name)
        if len(calls) == times:
            os._exit(9)
        return real(*arguments, **more)

    setattr(found, name, last)
    finetune(place, out)


def in_a_process(function, *arguments):
    """Call *function* in a process of its own; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lasting(record):
    """What of a record does not depend on when and how fast it was made."""
    record = {key: value for key, value in record.items() if key not in ("seconds", "files")}
    outcome = dict(record["outcome"])
    for key in ("seconds", "date", "machine"):
        del outcome[key]
    log = [{k: v for k, v in row.items() if "second" not in k} for row in record["log"]]
    control = {k: v for k, v in outcome["control_run"].items() if k != "name"}
    return json.loads(
        json.dumps(record | {"outcome": outcome | {"control_run": control}, "log": log})
    )


@pytest.mark.parametrize(
    ("where", "times"),
    [
        ("melinoe.finetune.run.remove_checkpoints", 2),  # the control's own is the first
        ("melinoe.outcome.record_origin", 1),
        ("melinoe.outcome.record.measure_model", 1),
        (
            "melinoe.outcome.record.measure_model",
            3,
        ),  # the control's turn
        ("melinoe.report.card.write_card", 1),
    ],
)
def test_a_run_that_is_killed_after_its_weights_is_completed(place, tmp_path, where, times):
    """Weights, record, outcome and card are those of an undisturbed run; nothing else is left."""
    assert in_a_process(killed, place, tmp_path / "out", where, times) == 9
    assert (tmp_path / "out" / "model.safetensors").exists()
    with pytest.raises(OutputExistsError):
        finetune(place, tmp_path / "out")
    finetune(place, tmp_path / "out", "--resume")
    out, quiet = tmp_path / "out", place / "quiet"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "out.control"]
    assert {one.name for one in out.iterdir()} == {one.name for one in quiet.iterdir()}
    assert (out / "model.safetensors").read_bytes() == (quiet / "model.safetensors").read_bytes()
    assert lasting(read_metadata(out)) == lasting(read_metadata(quiet))
    assert read_metadata(out)["files"] == read_metadata(quiet)["files"]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (("--lora-rank", 3), "lora_rank 2 there and 3 here"),
        (("--limit", 15), "another data"),
    ],
)
def test_another_runs_result_is_not_taken_for_ones_own(place, more, fault):
    """Other settings or other data: refused, and the result there stays as it is."""
    before = (place / "quiet" / "melinoe.json").read_bytes()
    with pytest.raises(TrainingError, match=fault):
        finetune(place, place / "quiet", "--resume", *more)
    assert (place / "quiet" / "melinoe.json").read_bytes() == before
