"""Two processes train the teacher and the run that learns from it, one after the other."""

import json

import pytest
from forked import run
from small_runs import settings

from melinoe.checkpoint.metadata import read_metadata
from melinoe.data import load_examples
from melinoe.finetune import finetune

ALONE = {"steps": 2, "batch_size": 4, "lambda_match": 1.0}
SHARED = ALONE | {"batch_size": 2}


def taught(place, out, changes):
    data = load_examples(place / "data.jsonl")
    chosen = settings(**changes)
    finetune(place / "base", data, place / out, chosen, teacher="plain", eval_examples=data)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_train_teacher_and_run_as_one_does(checkpoint, sharded):
    """``--teacher plain`` on several devices: both logs are those of one process."""
    rows = [{"prompt": "what? ", "completion": f"{word} is it."} for word in ("a", "an", "the")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (checkpoint / "data.jsonl").write_text(text)
    taught(checkpoint, "one", ALONE)
    two = {"processes": 2, "sharded": sharded}
    assert run(lambda: taught(checkpoint, "two", SHARED), **two) == [0, 0]
    for name in ("", ".teacher"):
        ours, theirs = (read_metadata(checkpoint / f"{out}{name}")["log"] for out in ("two", "one"))
        assert ("match" in ours[1]) is (name == "")
        for row, alone in zip(ours, theirs, strict=True):
            assert row == pytest.approx(alone, rel=2e-5, abs=1e-7)
