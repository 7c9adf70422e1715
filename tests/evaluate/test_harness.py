"""Tasks of the lm-evaluation-harness: from local files, end to end, on the shipped model."""

import json
import sys

import numpy as np
import pytest
import torch

import melinoe
from melinoe.checkpoint import load_tokenizer
from melinoe.errors import DataError, DependencyError
from melinoe.evaluate import run_tasks
from melinoe.report.records import check
from melinoe.shipped import TINY_OLMOE

ROWS = [
    ("The king of", [" England", " banana", " of"], 0),
    ("To be or not to", [" table", " be"], 1),
    ("It was the first time", [" soup", " of", " that"], 1),
    ("My lord, the", [" queen", " integer"], 1),
    ("She had been a", [" woman", " quickly"], 0),
]
CHOICE = """\
task: here_choice
dataset_path: json
dataset_kwargs: {{data_files: {data}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """\
task: here_write
dataset_path: json
dataset_kwargs: {{data_files: {data}, cache_dir: {cache}}}
output_type: generate_until
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
ABSENT = """\
task: here_absent
dataset_path: json
dataset_kwargs: {{data_files: {data}.absent, cache_dir: {cache}}}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of task files over one local JSONL."""
    path = tmp_path_factory.mktemp("tasks")
    data = path / "data.jsonl"
    rows = [{"question": q, "choices": c, "label": i} for q, c, i in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("write", WRITE), ("absent", ABSENT)):
        (path / f"{name}.yaml").write_text(text.format(data=data, cache=path / "cache"))
    return path


def opened(slots):
    model, handle = melinoe.load(TINY_OLMOE, slots=slots, dtype=torch.float32)
    return model, handle, load_tokenizer(str(TINY_OLMOE), model.config)


@pytest.fixture(scope="module")
def found(tasks):
    """What six of 32 resident experts score, and all of them; and the choices by hand."""
    scores = {}
    for slots in (6, 32):
        model, handle, tokenizer = opened(slots)
        scores[slots] = run_tasks(model, tokenizer, ["here_choice", "here_write"], "m",
                                  task_path=tasks, batch_size=3)  # fmt: skip
        assert slots == 32 or handle.counters.loads.sum() > 0
        if slots == 32:
            right = []
            for text, choices, label in ROWS:
                sums = []
                for choice in choices:
                    start = len(tokenizer(text)["input_ids"])
                    ids = torch.tensor([tokenizer(text + choice)["input_ids"]])
                    with torch.no_grad():
                        logp = model(ids).logits.log_softmax(-1)[0, :-1]
                    picked = logp.gather(1, ids[0, 1:, None])[start - 1 :]
                    sums.append(float(picked.sum()))
                right.append(float(int(np.argmax(sums)) == label))
            scores["by hand"] = right
        handle.detach()
    return scores


def test_an_offloaded_model_scores_exactly_what_the_resident_one_does(found):
    """Six slots a layer against all: the same numbers, example by example."""
    for ours, theirs in zip(found[6], found[32], strict=True):
        assert (ours.task, ours.metric, ours.estimate) == (
            theirs.task,
            theirs.metric,
            theirs.estimate,
        )
        assert ours.per_example.tolist() == theirs.per_example.tolist()


def test_a_choice_is_scored_as_by_hand(found):
    """The likelier continuation, from the model's own logits; some right and some wrong."""
    choice = found[6][0]
    assert (choice.task, choice.metric) == ("here_choice", "acc")
    assert choice.per_example.tolist() == found["by hand"]
    assert 0 < choice.estimate.mean < 1


def test_task_scores_are_records_and_can_be_paired(found):
    """Against itself no difference is shown, and the records pass the report's check."""
    for ours, theirs in zip(found[6], found[32], strict=True):
        record = json.loads(json.dumps(ours.to_record()))
        assert check(record, "here") == "score"
        assert record["score"]["n"] == len(ROWS) and record["harness"]["lm_eval"]
        comparison = ours.against(theirs)
        assert comparison.better is None and comparison.change.mean == 0


def test_an_unknown_task_and_an_absent_directory_are_named(tasks, monkeypatch):
    """With what was perhaps meant; the harness's own index of tasks is left out for speed."""
    import lm_eval.tasks

    whole = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda **options: whole(**options | {"include_defaults": False}),
    )
    with pytest.raises(DataError, match=r"no task 'here_choise'; did you mean here_choice"):
        run_tasks(None, None, ["here_choise"], "m", task_path=tasks)
    with pytest.raises(DataError, match="is no directory"):
        run_tasks(None, None, ["here_choice"], "m", task_path=tasks / "absent")


def test_a_task_without_its_data_is_said(tasks):
    """The harness's many kinds of errors become one sentence."""
    model, handle, tokenizer = opened(32)
    with pytest.raises(DataError, match="could not run here_absent"):
        run_tasks(model, tokenizer, ["here_absent"], "m", task_path=tasks)
    handle.detach()


def test_without_the_harness_the_way_out_is_said(monkeypatch):
    """It is optional, and asked for by name."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DependencyError, match=r"pip install 'melinoe\[eval\]'"):
        run_tasks(None, None, ["here_choice"], "m")
