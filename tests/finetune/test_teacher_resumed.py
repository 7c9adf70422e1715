"""A taught run that goes on: which teacher it takes for its own."""

import shutil
from functools import partial

import pytest
from small_runs import settings

from melinoe.data import Example, load_examples
from melinoe.errors import OutputExistsError, TrainingError
from melinoe.finetune import finetune
from melinoe.finetune.run import train_control


def test_a_teacher_of_other_settings_is_not_resumed_from(checkpoint):
    """It was trained at another rate, so it is not what the settings would give."""
    data = load_examples(checkpoint / "data.jsonl")
    other = settings(save="adapter", learning_rate=3e-3, steps=1).plain()
    finetune(checkpoint / "base", data, checkpoint / "out.teacher", other)
    now = settings(lambda_match=1.0, steps=1, log_every=2)
    with pytest.raises(TrainingError, match=r"learning_rate 0\.003 there and 0\.01 here"):
        finetune(checkpoint / "base", data, checkpoint / "out", now, teacher="plain", resume=True)
    assert not (checkpoint / "out").exists()


def replaying(**changes):
    """A run of one step that replays text and learns from a teacher."""
    return settings(steps=1, lambda_match=1.0, lambda_replay=0.1, **changes)


def anchor_text(word):
    return [Example("what? ", f"{word} was it.", "anchor")]


def test_a_control_of_another_run_is_not_resumed_from(checkpoint):
    """Its settings are those asked for, but its data, replayed text or teacher is another."""
    data, base, now = load_examples(checkpoint / "data.jsonl"), checkpoint / "base", replaying()
    for name, seed in (("teacher", 0), ("other", 1)):
        plain = settings(save="adapter", steps=1, seed=seed).plain()
        finetune(base, data, checkpoint / name, plain)

    def control(data=data, word="she", teacher="teacher"):
        return train_control(
            base, data, checkpoint / "out", now, resume=True,
            anchor_examples=anchor_text(word), teacher=checkpoint / teacher,
        )  # fmt: skip

    out = control()
    before = (out / "melinoe.json").read_bytes()
    assert control() == out
    for given, fault in (
        ({"data": data[:2]}, "another data"),
        ({"word": "he"}, "another anchor text"),
        ({"teacher": "other"}, "another teacher"),
    ):
        with pytest.raises(TrainingError, match=fault):
            control(**given)
    with pytest.raises(TrainingError, match="another anchor text"):  # the base's own now
        train_control(
            base, data, checkpoint / "out", now, resume=True, teacher=checkpoint / "teacher"
        )
    assert (out / "melinoe.json").read_bytes() == before


def test_the_teacher_of_a_finished_run_may_be_gone(checkpoint):
    """Its name is compared then, and nothing is trained anew."""
    data, base, out = load_examples(checkpoint / "data.jsonl"), checkpoint / "base", "out"
    now = settings(steps=1, lambda_match=1.0)
    finetune(base, data, checkpoint / out, now, teacher="plain")
    shutil.rmtree(checkpoint / "out.teacher")
    resumed = partial(finetune, base, data, checkpoint / out, now, resume=True)
    assert resumed(teacher="plain").metadata["teacher"]["fingerprint"]
    assert not (checkpoint / "out.teacher").exists()
    for teacher in (None, checkpoint / "elsewhere"):
        with pytest.raises(TrainingError, match="another teacher"):
            resumed(teacher=teacher)


def test_no_teacher_is_trained_beside_a_run_that_did_not_end(checkpoint):
    """Its checkpoints are found before, not after, the work for the teacher."""
    (checkpoint / "out.checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="did not end"):
        finetune(
            checkpoint / "base", checkpoint / "data.jsonl", checkpoint / "out",
            settings(lambda_match=1.0), teacher="plain",
        )  # fmt: skip
    assert not (checkpoint / "out.teacher").exists()
