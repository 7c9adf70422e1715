"""Two processes train as one does: DDP and FSDP2 over gloo, with a kill and a resume between."""

import json
import logging
import math
import os
import signal

import pytest
import torch
from forked import finetuned, run
from transformers import AutoModelForCausalLM, TrainerCallback

from melinoe.data import load_examples
from melinoe.errors import InterruptedRunError, TrainingError

# Four rows a step, however they are shared out; 11 examples leave the last of 3 steps incomplete.
ALONE = {"epochs": 1.0, "steps": None, "batch_size": 4, "log_every": 1}
SHARED = ALONE | {"batch_size": 1, "gradient_accumulation": 2}


class Look(TrainerCallback):
    """Writes down how the model is wrapped, and what the Trainer wrote to the terminal would be."""

    def __init__(self, place):
        self.place = place

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        kinds = sorted({type(p.data).__name__ for p in model.parameters()})
        (self.place / f"kinds-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(kinds))


@pytest.fixture
def place(checkpoint):
    """Eleven examples of several lengths."""
    words = ["a", "the", "an", "it", "one", "two", "three", "four", "five", "six", "seven"]
    rows = [{"prompt": "what? ", "completion": f"{word} is it."} for word in words]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (checkpoint / "data.jsonl").write_text(text)
    assert len(load_examples(checkpoint / "data.jsonl")) == 11
    return checkpoint


def log_of(place, out):
    return json.loads((place / f"{out}.json").read_text())


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_give_the_curve_and_the_model_of_one(place, sharded):
    """Every term, the gradient's norm and every measurement; then killed, resumed, and the same."""
    learn = {"train": "router+experts+attention"}
    finetuned(place, "one", **ALONE, **learn)
    given = {"processes": 2, "sharded": sharded}
    look, shared = [Look(place)], SHARED | learn
    assert run(lambda: finetuned(place, "two", callbacks=look, **shared), **given) == [0, 0]
    for rank in (0, 1):
        kinds = json.loads((place / f"kinds-{rank}.json").read_text())
        assert kinds == (["DTensor"] if sharded else ["Tensor"])
    one, two = log_of(place, "one"), log_of(place, "two")
    assert [row["step"] for row in one] == [0, 1, 2, 3, 3]
    assert {"nll", "cache", "total", "grad_norm"} <= two[1].keys()
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-7)
    wanted = weights(place / "one")
    for name, tensor in weights(place / "two").items():
        assert torch.allclose(tensor.float(), wanted[name].float(), rtol=1e-2, atol=1e-4), name

    killed = run(lambda: finetuned(place, "cut", kill_at=2, **shared), **given)
    assert killed == [-signal.SIGKILL] * 2
    assert [path.name for path in (place / "cut.checkpoints").iterdir()] == ["step-000002"]
    assert run(lambda: finetuned(place, "cut", resume=True, **shared), **given) == [0, 0]
    assert log_of(place, "cut") == two
    resumed, uninterrupted = weights(place / "cut"), weights(place / "two")
    assert all(torch.equal(tensor, uninterrupted[name]) for name, tensor in resumed.items())
    assert sorted(path.name for path in place.iterdir() if path.is_dir()) == [
        "base", "cut", "one", "two"
    ]  # fmt: skip


def test_a_run_goes_on_with_another_number_of_processes(place):
    """Killed on two, resumed on one with the same rows per step: the curve of one."""
    finetuned(place, "one", **ALONE)
    run(lambda: finetuned(place, "cut", kill_at=2, **SHARED), processes=2)
    finetuned(place, "cut", resume=True, **ALONE)
    for ours, theirs in zip(log_of(place, "cut"), log_of(place, "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-7)


def test_a_bad_loss_on_one_process_skips_the_step_on_both(place):
    """The second process alone meets nan in its first step: both count it, and one says so."""
    import melinoe.finetune.trainer as trainer_module

    whole, calls = trainer_module.Objective.measure, []

    def broken(*args, training, **kwargs):
        terms = whole(*args, training=training, **kwargs)
        calls.extend([1] * training)
        if training and os.environ.get("RANK") == "1" and len(calls) == 1:
            terms.total = terms.total * float("nan")
        return terms

    def train():
        trainer_module.Objective.measure = broken
        log = logging.FileHandler(place / f"log-{os.environ['RANK']}")
        logging.getLogger("melinoe").addHandler(log)
        finetuned(place, "out", eval_every=None, **SHARED)

    assert run(train, processes=2) == [0, 0]
    assert [row.get("skipped_steps") for row in log_of(place, "out")] == [None, 1, 1, None]
    assert (place / "log-0").read_text().count("step 1 is skipped") == 1
    assert (place / "log-1").read_text() == ""


@pytest.mark.parametrize(("sharded", "measured"), [(False, False), (True, False), (True, True)])
def test_a_weight_that_is_no_number_is_named_by_every_process(place, sharded, measured):
    """
    Sharded, the second process alone holds it; found by a step's loss, or by measuring.

    It breaks once the model is loaded, for loading would name it.
    """
    import melinoe.finetune.run as run_module

    whole = run_module.load_model

    def breaking(*args, **kwargs):
        model = whole(*args, **kwargs)
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight[-1, 0] = math.nan
        return model

    broken = r"model\.layers\.1\.self_attn\.q_proj\.weight holds NaN"
    said = f"held-out examples is not finite: {broken}" if measured else f"because {broken}"

    def train():
        run_module.load_model = breaking
        with pytest.raises(TrainingError, match=said):
            finetuned(place, "out", held_out=measured, **SHARED | {"eval_every": None})

    assert run(train, processes=2, sharded=sharded) == [0, 0]


class AskedOnOne(TrainerCallback):
    """A scheduler's SIGTERM reaches the second process alone."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_to_stop_that_reaches_one_process_stops_both(place):
    """They agree after the step, keep one checkpoint, and go on from it to the same curve."""
    finetuned(place, "one", **ALONE)

    def train():
        with pytest.raises(InterruptedRunError, match=r"after step 2 of 3.*--resume"):
            finetuned(place, "cut", callbacks=[AskedOnOne()], **SHARED | {"save_every": None})

    assert run(train, processes=2) == [0, 0]
    assert [path.name for path in (place / "cut.checkpoints").iterdir()] == ["step-000002"]
    assert run(lambda: finetuned(place, "cut", resume=True, **SHARED), processes=2) == [0, 0]
    for ours, theirs in zip(log_of(place, "cut"), log_of(place, "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-7)


def test_sharding_that_accelerate_will_not_do_is_refused(place):
    """FSDP is asked for on the CPU, where accelerate alone would quietly run without it."""

    def train():
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        with pytest.raises(TrainingError, match="accelerate shards nothing on this kind of dev"):
            finetuned(place, "out", **ALONE)

    assert run(train, processes=2) == [0, 0]
    assert not (place / "out.checkpoints").exists()
