"""What is no control, or cannot be measured as one: one sentence, and the rest is kept."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from small_olmoe import write_checkpoint
from three_models import SETTINGS, texts

import melinoe.outcome.record as module
from melinoe.checkpoint import read_metadata, write_metadata
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import CheckpointError, WriteError
from melinoe.finetune import finetune
from melinoe.outcome import record_outcome, why_no_control

SETTINGS_OF = {
    "lambda_cache": 0.5, "lambda_rank": 0.1, "seed": 3, "batch_size": 4,
}  # fmt: skip
OFF = {"lambda_cache": 0.0}
OURS = {
    "settings": SETTINGS_OF,
    "processes": 2,
    "base_fingerprint": "a",
    "data": {"examples": 9, "tokens_sha256": "d"},
}
THEIRS = OURS | {"settings": SETTINGS_OF | OFF}


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (THEIRS, None),
        (OURS, "with locality terms"),
        ({}, "no melinoe.json"),
        (THEIRS | {"base_fingerprint": "b"}, "another base"),
        (THEIRS | {"settings": SETTINGS_OF | OFF | {"seed": 4}}, "seed 4 in it and 3 in this run"),
        (THEIRS | {"settings": SETTINGS_OF | OFF | {"capacity": 0.5, "gamma": 1.0}}, None),
        (
            THEIRS | {"settings": SETTINGS_OF | OFF | {"batch_size": 8}},
            "16 rows a step in it",
        ),
        (THEIRS | {"settings": SETTINGS_OF | OFF | {"batch_size": 8}, "processes": 1}, None),
        (THEIRS | {"processes": 1}, "4 rows a step in it and 8"),
        (THEIRS | {"data": {"examples": 8}}, "other data"),
        (THEIRS | {"data": {"examples": 9, "tokens_sha256": "e"}}, "other data"),
        (THEIRS | {"data": {"examples": 8, "tokens_sha256": "d"}}, None),  # one was too long
        (THEIRS | {"data": None, "processes": None, "base_fingerprint": None}, None),
        (
            THEIRS | {"settings": SETTINGS_OF | OFF | {"lambda_concentration": 1.0}},
            "with locality terms",
        ),
        (THEIRS | {"settings": SETTINGS_OF | OFF | {"lambda_rank": 0.0}}, "lambda_rank 0.0 in it"),
        (THEIRS | {"settings": {"seed": "three"} | OFF}, "no melinoe.json"),
        (THEIRS | {"settings": {"gamma": 7} | OFF}, "no melinoe.json"),
    ],
)
def test_a_control_has_everything_in_common_but_the_terms(theirs, said):
    """The locality terms and what they read may differ, and what nobody wrote down."""
    why = why_no_control(theirs, OURS)
    assert why is None if said is None else said in why


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a run for locality on it, and its control as a checkpoint and as an adapter."""
    place = tmp_path_factory.mktemp("runs")
    for name, seed in (("base", 0), ("stranger", 1)):
        write_checkpoint(place / name, seed)
    data = [Example(f"w{i} w4", f"w{i + 3} w5 w{9 - i}", "x") for i in range(2, 8)]
    settings = FinetuneSettings(
        steps=2, batch_size=3, learning_rate=1e-2, lora_rank=2, lambda_replay=0.0
    )
    for name, base, chosen, save in (
        ("tuned", "base", settings, "merged"),
        ("whole", "base", settings.control(), "merged"),
        ("adapter", "base", settings.control(), "adapter"),
        ("foreign", "stranger", settings.control(), "adapter"),
    ):
        saved = FinetuneSettings(**{**vars(chosen), "save": save})
        finetune(place / base, data, place / name, saved)
    return place


@pytest.fixture(autouse=True, scope="module")
def measured_once():
    """Base and run are the same in every test, and a model's figures do not change."""
    measure, known = module.measure_model, {}

    def once(path, *arguments):
        name = Path(path).name
        if name not in ("base", "tuned"):
            return measure(path, *arguments)
        if name not in known:
            known[name] = measure(path, *arguments)
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_model", once)
        yield


@pytest.fixture
def out(place, tmp_path):
    """The run for locality, alone in a directory, so that leavings show."""
    shutil.copytree(place / "tuned", tmp_path / "tuned")
    return tmp_path / "tuned"


def record(out, place, control):
    """The outcome beside a control."""
    found = record_outcome(
        out, place / "base", {"words": texts()}, settings=SETTINGS, control=control
    )
    return found["outcome"]


def test_an_adapter_is_measured_as_the_checkpoint_it_merges_to(place, out):
    """Every figure of the two is the same, and nothing is left beside the run."""
    whole = record(out, place, place / "whole")
    alone = record(out, place, place / "adapter")
    assert alone["control"] == whole["control"] != alone["after"]
    assert alone["change_from_control"] == whole["change_from_control"]
    assert [path.name for path in out.parent.iterdir()] == ["tuned"]


def tear(place, tmp_path, name, file):
    """A copy of a control of which a file ends too early."""
    torn = tmp_path.parent / f"{tmp_path.name}-torn"
    shutil.copytree(place / name, torn)
    os.truncate(torn / file, (torn / file).stat().st_size // 2)
    return torn


def unmeasured(out, place, control, error, said):
    """A sentence; all files of the run as they were; the outcome beside the base is there."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".json"}
    with pytest.raises(error, match=said) as raised:
        record(out, place, control)
    assert str(raised.value).count("\n") == 0
    outcome = read_metadata(out)["outcome"]
    assert outcome["change"]["perplexity"]["words"]["n"] == 8 and "control" not in outcome
    for name, content in files.items():
        assert (out / name).read_bytes() == content
    assert [path.name for path in out.parent.iterdir()] == ["tuned"]


def test_a_control_of_another_base_is_refused(place, out):
    """By the routers it began from, though its shapes fit."""
    unmeasured(out, place, place / "foreign", CheckpointError, "trained on another base model")


def test_a_run_without_a_record_is_refused(place, out, tmp_path):
    """Nobody could tell whether it is the control."""
    copy = tmp_path.parent / f"{tmp_path.name}-bare"
    shutil.copytree(place / "foreign", copy)
    (copy / "melinoe.json").unlink()
    unmeasured(out, place, copy, CheckpointError, "no melinoe.json that says how it was trained")


@pytest.mark.parametrize(
    ("name", "file"),
    [("adapter", "adapter_model.safetensors"), ("whole", "model.safetensors")],
)
def test_a_torn_control_is_named(place, out, tmp_path, name, file):
    """Half an adapter, half a checkpoint."""
    torn = tear(place, tmp_path, name, file)
    unmeasured(out, place, torn, CheckpointError, str(torn))


def test_a_control_that_is_not_there_is_named(place, out):
    """As one that no run wrote."""
    unmeasured(out, place, place / "absent", CheckpointError, "absent is no control of this run")


def test_a_disk_too_small_for_the_merged_control_is_said_before_it_is_merged(
    place, out, monkeypatch
):
    """With the bytes it would take; nothing is left of it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 100))
    monkeypatch.setattr("melinoe.outcome.control.merge_adapter", None)
    unmeasured(out, place, place / "adapter", WriteError, r"cannot be merged .* 100B are free")


def test_a_disk_that_fills_up_while_it_is_merged_leaves_nothing(place, out, monkeypatch):
    """As when something else writes there at the same time."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("melinoe.checkpoint.writing.copyfile", full)
    unmeasured(out, place, place / "adapter", WriteError, "No space left on device")


def test_a_reference_with_weights_and_adapter_is_measured_as_it_is(place, out, monkeypatch):
    """What `--save both` leaves: nothing is merged."""
    both = out.parent.with_name(f"{out.parent.name}-both")
    shutil.copytree(place / "whole", both)
    shutil.copytree(place / "adapter", both / "adapter")
    monkeypatch.setattr("melinoe.outcome.control.merge_adapter", None)
    write_metadata(both, read_metadata(both) | {"fingerprint": None})
    assert record(out, place, both)["control_run"]["fingerprint"] is None
