"""A run that was killed goes on where it was; a torn checkpoint or a full disk loses nothing."""

import errno
import json
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from forked import finetuned, run
from small_runs import examples, settings
from tiny import tiny_model
from transformers import AutoModelForCausalLM, TrainerCallback

import melinoe.finetune.resume as checkpoints_module
from melinoe.checkpoint import load_model, open_checkpoint
from melinoe.checkpoint.writing import check_room, write_model
from melinoe.errors import (
    DependencyError,
    InterruptedRunError,
    OutputExistsError,
    TrainingError,
    WriteError,
)
from melinoe.finetune import train
from melinoe.finetune.resume import (
    list_checkpoints,
    newest_checkpoint,
    random_state,
    read_state,
    set_random_state,
)

# Rows every 2 steps, measured and saved every 3 of 7, killed before the pass of step 6: the newest
# checkpoint is of step 3, half-way to a row, and what follows must be as if nothing had happened.
STEPS = {"steps": 7, "save_every": 3, "batch_size": 2, "schedule": "cosine", "warmup": 0.3}


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()


def log_of(place, out):
    return json.loads((place / f"{out}.json").read_text())


def names(place):
    return sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}])
def test_a_killed_run_goes_on_to_the_same_curve_bit_for_bit(checkpoint, changes):
    """SIGKILL in the middle, then the same command with resume: equal rows, equal weights."""
    given = STEPS | changes
    assert run(lambda: finetuned(checkpoint, "whole", **given)) == [0]
    assert run(lambda: finetuned(checkpoint, "cut", kill_at=5, **given)) == [-signal.SIGKILL]
    assert names(checkpoint / "cut.checkpoints") == ["step-000003"]
    with pytest.raises(OutputExistsError, match="--resume"):
        finetuned(checkpoint, "cut", **given)
    assert run(lambda: finetuned(checkpoint, "cut", resume=True, **given)) == [0]
    rows = log_of(checkpoint, "whole")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 6, 6, 7]
    assert log_of(checkpoint, "cut") == rows
    ours, theirs = weights(checkpoint / "cut"), weights(checkpoint / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert names(checkpoint) == [
        "base", "cut", "cut.json", "data.jsonl", "whole", "whole.json"
    ]  # fmt: skip


def in_memory(directory, resume=False, callbacks=(), anchor=None, **changes):
    """Rows of a run in this process, with checkpoints."""
    return train(
        tiny_model("olmoe"),
        examples(8),
        settings(**{"save_every": 1, "train": "router"} | changes),
        pad_token_id=0,
        checkpoints=directory,
        resume=resume,
        callbacks=callbacks,
        anchor_data=anchor,
    ).rows


class Asked(TrainerCallback):
    """Presses Ctrl-C in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path):
    """Asked in step 3 of 5, no checkpoint due: the step ends, is kept, and the rest is equal."""
    before = signal.getsignal(signal.SIGINT)
    whole = in_memory(tmp_path / "whole", steps=5, save_every=None)
    with pytest.raises(InterruptedRunError, match=r"after step 3 of 5.*--resume"):
        in_memory(tmp_path / "run", steps=5, save_every=None, callbacks=[Asked(2)])
    assert signal.getsignal(signal.SIGINT) is before
    assert names(tmp_path / "run") == ["step-000003"]
    assert in_memory(tmp_path / "run", resume=True, steps=5, save_every=None) == whole


def tear(path, how):
    """Damage a checkpoint in one of the ways a machine can."""
    parts = path / "parts.safetensors"
    if how == "cut":
        os.truncate(parts, parts.stat().st_size - 100)
    elif how == "flipped":
        data = bytearray(parts.read_bytes())
        data[-7] ^= 1
        parts.write_bytes(data)
    elif how == "gone":
        (path / "optimizer.safetensors").unlink()
    elif how == "state":
        (path / "state.json").write_text('{"format": 3, "step"')
    elif how == "empty":
        shutil.rmtree(path)
        path.mkdir()


def test_a_checkpoint_just_written_stays_beside_torn_ones_of_higher_steps(tmp_path):
    """A run begun anew among two torn ones of later steps keeps what it writes."""
    directory = tmp_path / "run"
    in_memory(directory, steps=1)
    (first,) = list_checkpoints(directory)
    for step in (500, 490):
        shutil.copytree(first, directory / f"step-{step:06}")
        tear(directory / f"step-{step:06}", "cut")
    shutil.rmtree(first)
    in_memory(directory, steps=1)
    assert newest_checkpoint(directory) == first


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, monkeypatch):
    """The newest but one is damaged in five ways: it is named each time, and the first is taken."""
    whole = tmp_path / "whole"
    monkeypatch.setattr(checkpoints_module, "_KEPT", 3)
    in_memory(whole, steps=3)
    shutil.rmtree(list_checkpoints(whole)[0])  # a finished run's last one needs no optimizer
    for how in ("cut", "flipped", "gone", "state", "empty"):
        directory = tmp_path / how
        shutil.copytree(whole, directory)
        newest, first = list_checkpoints(directory)
        tear(newest, how)
        assert newest_checkpoint(directory) == first
        assert f"{newest} is torn" in caplog.text
        tear(first, how)
        assert newest_checkpoint(directory) is None


def test_a_full_disk_leaves_the_checkpoints_before_and_the_run_goes_on(
    tmp_path, monkeypatch, caplog
):
    """The second of three checkpoints meets ENOSPC with half of it written."""
    save, calls = checkpoints_module.save_file, []

    def full(tensors, path):
        calls.append(path)
        if ".step-000002." in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(checkpoints_module, "save_file", full)
    rows = in_memory(tmp_path / "run", steps=3)
    assert [row["step"] for row in rows] == [1, 2, 3] and calls
    assert names(tmp_path / "run") == ["step-000001", "step-000003"]
    assert "checkpoint of step 2 could not be written" in caplog.text
    assert "No space left on device" in caplog.text and "free some space" in caplog.text


def test_a_result_that_cannot_be_written_is_not_lost(checkpoint, monkeypatch):
    """ENOSPC at the very end: the sentence names what is kept; resuming only writes it."""
    import melinoe.finetune.run as run_module

    def full(*args):
        raise WriteError("out could not be written (No space left on device); free some space")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_result", full)
        with pytest.raises(WriteError, match=r"out\.checkpoints.*--resume writes it"):
            finetuned(checkpoint, "out", steps=2)
    assert not (checkpoint / "out").exists()
    finetuned(checkpoint, "out", steps=2, resume=True)
    assert [row["step"] for row in log_of(checkpoint, "out")] == [0, 1, 2, 2]
    assert not (checkpoint / "out.checkpoints").exists()


def test_a_disk_full_before_the_end_is_told_by_the_step_that_is_kept(checkpoint, monkeypatch):
    """The last checkpoint found no room either: nobody is told that all of the run is there."""
    import melinoe.finetune.run as run_module
    import melinoe.finetune.trainer as trainer_module

    plain = trainer_module.resume.write_checkpoint

    def full(*args):
        raise WriteError("out could not be written (No space left on device); free some space")

    def full_from_step_2(directory, step, *args, **options):
        return full() if step >= 2 else plain(directory, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_result", full)
        patch.setattr(trainer_module.resume, "write_checkpoint", full_from_step_2)
        with pytest.raises(WriteError, match=r"up to step 1 is kept in .*--resume goes on from"):
            finetuned(checkpoint, "out", steps=3, save_every=1)
    finetuned(checkpoint, "out", steps=3, save_every=1, resume=True)
    assert [row["step"] for row in log_of(checkpoint, "out")][-1] == 3


def test_a_full_disk_at_the_end_leaves_no_half_result(checkpoint, monkeypatch):
    """An error of the operating system while the weights are written becomes one sentence."""
    base = str(checkpoint / "base")
    with open_checkpoint(base) as opened:
        model = load_model(opened)

    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("melinoe.checkpoint.writing.copyfile", full)
    before = sorted(checkpoint.iterdir())
    with pytest.raises(WriteError, match=r"No space left on device\); free some space"):
        write_model(model, base, checkpoint / "out", {}, [])
    assert sorted(checkpoint.iterdir()) == before


def test_a_disk_too_small_for_the_result_is_refused_before_any_training(tmp_path, monkeypatch):
    """A petabyte fits nowhere, a byte does; and small amounts are not all 0.0 GiB."""
    check_room(tmp_path / "deep" / "out", 1)
    with pytest.raises(WriteError, match=r"will take 1048576GiB, .* are free there"):
        check_room(tmp_path / "deep" / "out", 2**50)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 5 * 2**20))
    with pytest.raises(WriteError, match=r"take 10\.582MiB, but only 5MiB are free there"):
        check_room(tmp_path / "deep" / "out", 11_095_496)


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path):
    """Other settings would give a curve that no run has; how often to log or save is free."""
    in_memory(tmp_path, steps=2)
    for change, named in (({"learning_rate": 2e-2}, "rate"), ({"batch_size": 2}, "rows_per_step")):
        with pytest.raises(TrainingError, match=rf"another run.*{named}.*--resume"):
            in_memory(tmp_path, resume=True, steps=2, **change)
    in_memory(tmp_path, resume=True, steps=2, log_every=5, save_every=None)


def test_a_checkpoint_of_a_run_that_replayed_other_text_is_refused(tmp_path):
    """Equal settings, but what is replayed is another."""
    replaying = {"steps": 2, "lambda_replay": 0.1}
    in_memory(tmp_path, anchor=examples(2, 5), **replaying)
    with pytest.raises(TrainingError, match=r"another run \(another anchor text\)"):
        in_memory(tmp_path, resume=True, anchor=examples(2, 6), **replaying)
    in_memory(tmp_path, resume=True, anchor=examples(2, 5), **replaying)


def test_a_checkpoint_holds_only_what_is_trained(tmp_path):
    """Router weights, their moments and the state; no frozen weight, no pickle."""
    in_memory(tmp_path, steps=2)
    path = list_checkpoints(tmp_path)[1]
    assert names(path) == [
        "optimizer.safetensors",
        "parts.safetensors",
        "state.json",
        "trainer_state.json",
    ]
    parts = checkpoints_module.read_tensors(path, "parts")
    assert set(parts) == {f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)}
    assert read_state(path)["step"] == 1


def test_measuring_without_examples_is_refused():
    """One sentence names the setting and the option that is missing."""
    with pytest.raises(TrainingError, match=r"eval_every=.*--eval-data"):
        train(tiny_model("olmoe"), examples(), settings(eval_every=2), pad_token_id=0)


def test_a_tracker_that_is_not_there_is_named():
    """Before anything is loaded or trained."""
    with pytest.raises(DependencyError, match="no-such-tracker"):
        train(
            tiny_model("olmoe"), examples(), settings(report_to=("no-such-tracker",)),
            pad_token_id=0,
        )  # fmt: skip


def test_tensorboard_gets_every_term(tmp_path):
    """Through the Trainer's own switch: event files lie beside the checkpoints."""
    in_memory(tmp_path, steps=2, report_to=("tensorboard",))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/nll", "train/cache", "train/total", "train/loss"} <= set(found)


def test_random_states_come_back():
    """What torch draws next is what it drew."""
    torch.rand(3)
    state = random_state()
    drawn = torch.rand(3).tolist()
    set_random_state(state)
    assert torch.rand(3).tolist() == drawn
