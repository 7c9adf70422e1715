"""A taught run that goes on: which teacher it takes for its own."""

from dataclasses import asdict, replace

import pytest
from small_runs import settings

from melinoe.checkpoint.metadata import write_metadata
from melinoe.data import load_examples
from melinoe.errors import TrainingError
from melinoe.finetune import finetune
from melinoe.finetune.price import _one_run


def test_a_teacher_of_other_settings_is_not_resumed_from(checkpoint):
    """It was trained at another rate, so it is not what the settings would give."""
    data = load_examples(checkpoint / "data.jsonl")
    other = settings(save="adapter", learning_rate=3e-3, steps=1).plain()
    finetune(checkpoint / "base", data, checkpoint / "out.teacher", other)
    now = settings(lambda_match=1.0, steps=1, log_every=2)
    with pytest.raises(TrainingError, match=r"learning_rate 0\.003 there and 0\.01 here"):
        finetune(checkpoint / "base", data, checkpoint / "out", now, teacher="plain", resume=True)
    assert not (checkpoint / "out").exists()


@pytest.mark.parametrize(
    ("teacher", "changes", "fault"),
    [
        (None, {}, "another teacher"),
        ("t", {"lambda_cache": 2.0}, "another strength"),
        ("t", {"learning_rate": 0.5}, "learning_rate 0.01 there and 0.5 here"),
    ],
)
def test_a_searchs_finished_run_is_taken_for_what_it_was(tmp_path, teacher, changes, fault):
    """Settings and teacher agree: its record is read; one of them does not: it is refused."""
    recorded = settings(lambda_match=1.0)
    (tmp_path / "1").mkdir()
    write_metadata(
        tmp_path / "1",
        {
            "settings": asdict(recorded),
            "teacher": {"source": "t", "fingerprint": "0" * 64},
            "log": [],
        },
    )

    def resumed(now, teacher):
        return _one_run("m", [], tmp_path / "1", now, teacher=teacher, resume=True)

    assert resumed(recorded, "t").log == []
    with pytest.raises(TrainingError, match=fault):
        resumed(replace(recorded, **changes), teacher)
