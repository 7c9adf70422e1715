"""`melinoe finetune` beside its control, and what it says was paid over it."""

import json
import os
import shutil
from functools import partial

import pytest
from data_rows import write
from small_olmoe import write_checkpoint

from melinoe.checkpoint import load_tokenizer, read_metadata
from melinoe.checkpoint.files import read_config
from melinoe.cli import main
from melinoe.cli.finetune import _check_control, _is_measured
from melinoe.config import FinetuneSettings, OutcomeSettings
from melinoe.data import encode, load_examples
from melinoe.errors import CheckpointError
from melinoe.evaluate import perplexity, perplexity_increase
from melinoe.finetune.saving import merge_adapter

STEPS = (
    *("--steps", 2, "--batch-size", 4, "--learning-rate", 0.01),
    *("--lora-rank", 2, "--lambda-replay", 0),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """
    A base, sixteen examples to train on, eight of the kind held out, six of another kind.

    One more to train on is too long to be learned, so that fewer are learned than were given.
    """
    place = tmp_path_factory.mktemp("place")
    write_checkpoint(place / "base")
    for name, first, count in (("train", 2, 16), ("held", 3, 8), ("far", 12, 6)):
        rows = [
            {"prompt": f"w{first + i} ", "completion": f"w{9 + i} w4 w{3 + i} w{20 - i}"}
            for i in range(count)
        ]
        if name == "train":
            rows.append({"prompt": "w3 " * 600, "completion": "w4"})
        write(place / f"{name}.jsonl", *rows)
    return place


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Three short completions of each model are enough here, and no figure is looked at."""
    small = partial(OutcomeSettings, prompts=3, max_new_tokens=4)
    monkeypatch.setattr("melinoe.outcome.record.OutcomeSettings", small)
    monkeypatch.setattr("melinoe.report.card.figures_of", lambda records: [])


@pytest.fixture
def finetune(place, monkeypatch, capsys):
    """Run the command with the place's data; exit code and what went to stderr."""

    def run(out, *more):
        common = ("--data", place / "train.jsonl", "--eval-data", place / "held.jsonl")
        arguments = ("finetune", place / "base", *common, "--out", out, *STEPS, *more)
        monkeypatch.setattr("sys.argv", ["melinoe", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        return code or 0, capsys.readouterr().err

    return run


def price_by_hand(place, tuned, control, rows=slice(None)):
    """The paired increase on the held-out file, from the two checkpoints themselves."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(place / "base"), read_config(str(place / "base")))
    encoded = encode(load_examples(place / "held.jsonl")[rows], tokenizer, 512)
    found = [
        perplexity(AutoModelForCausalLM.from_pretrained(path), encoded) for path in (tuned, control)
    ]
    return perplexity_increase(*found).to_dict()


def beside(place, tmp_path):
    """Names of what lies where the run was written."""
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_run_is_held_against_the_control_it_trains(place, finetune, tmp_path):
    """The adapter in OUT.control, merged here by itself, gives the price the card begins with."""
    more = ("--against", "control", "--other", place / "far.jsonl")
    code, err = finetune(tmp_path / "out", *more)
    assert code == 0 and "measuring its control" in err, err
    assert beside(place, tmp_path) == ["out", "out.control"]
    metadata = read_metadata(tmp_path / "out")
    alike = read_metadata(tmp_path / "out.control")
    assert alike["is_control"] and not metadata["is_control"]
    merge_adapter(tmp_path / "out.control", tmp_path / "merged", place / "base")
    change = metadata["outcome"]["change_from_control"]
    by_hand = price_by_hand(place, tmp_path / "out", tmp_path / "merged")
    assert change["perplexity"]["held"] == pytest.approx(by_hand, abs=1e-6)
    assert set(change["perplexity"]) == {"held", "far"}
    card = (tmp_path / "out" / "README.md").read_text()
    first = card.split("## What fine-tuning changed\n\n")[1].split("\n")[0]
    assert "its control, the same training without the locality terms" in first
    assert "perplexity on held-out held" in first
    assert str(tmp_path) not in card + json.dumps(metadata)
    assert finetune(tmp_path / "out", *more, "--resume")[0] == 0


def test_an_earlier_control_is_named(place, finetune, tmp_path):
    """`--against` takes it; without it no price is claimed."""
    assert finetune(tmp_path / "c", "--control", "--save", "both")[0] == 0
    code, err = finetune(tmp_path / "against", "--against", tmp_path / "c")
    assert code == 0, err
    by_hand = price_by_hand(place, tmp_path / "against", tmp_path / "c")
    outcome = read_metadata(tmp_path / "against")["outcome"]
    assert outcome["change_from_control"]["perplexity"]["held"] == pytest.approx(by_hand, abs=1e-6)
    assert finetune(tmp_path / "alone")[0] == 0
    assert beside(place, tmp_path) == ["against", "alone", "c"]
    assert "control" not in read_metadata(tmp_path / "alone")["outcome"]
    said = (tmp_path / "alone" / "README.md").read_text()
    assert "What the locality terms saved and cost was not measured." in said


@pytest.fixture(scope="module")
def control(place, tmp_path_factory):
    """An adapter of the control."""
    out = tmp_path_factory.mktemp("control") / "control"
    arguments = (
        *("finetune", place / "base", "--data", place / "train.jsonl", "--out", out, *STEPS),
        *("--eval-data", place / "held.jsonl", "--control", "--save", "adapter"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["melinoe", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code
    return out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--seed", 1), "seed 0 in it and 1 in this run"),
        (("--no-measure",), "nothing will be measured"),
        (("--control",), "is for a run with locality terms"),
        (("--limit", 15), "trained on other data"),
    ],
)
def test_what_cannot_be_the_control_is_refused_before_any_training(
    finetune, control, tmp_path, more, said
):
    """One sentence, exit 1, nothing written."""
    code, err = finetune(tmp_path / "out", "--against", control, *more)
    assert code == 1 and said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_torn_control_leaves_the_run_whole_with_outcome_and_card(
    place, finetune, control, tmp_path
):
    """One sentence at the end, exit 1; what could be measured is in the record and on the card."""
    torn = tmp_path / "torn"
    shutil.copytree(control, torn)
    weights = torn / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    code, err = finetune(tmp_path / "out", "--against", torn)
    last = err.rstrip("\n").split("\n")[-1]
    assert code == 1 and last.startswith("melinoe: ") and "not beside the control" in last
    assert "adapter_model.safetensors is not readable" in last
    assert beside(place, tmp_path) == ["out", "torn"]
    outcome = read_metadata(tmp_path / "out")["outcome"]
    assert "control" not in outcome and outcome["change"]["perplexity"]["held"]["n"] == 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "What the locality terms saved and cost was not measured." in card


def test_a_control_of_another_base_is_refused_before_any_training(place, control, tmp_path):
    """Its settings and data would do."""
    write_checkpoint(tmp_path / "base", 1)
    given = FinetuneSettings(**read_metadata(control)["settings"] | {"lambda_cache": 1.0})
    examples = load_examples(place / "train.jsonl")
    _check_control(str(control), given, str(place / "base"), examples)
    with pytest.raises(CheckpointError, match="trained on another base model"):
        _check_control(str(control), given, str(tmp_path / "base"), examples)


def test_a_taken_place_of_the_control_is_said_before_any_training(finetune, tmp_path):
    """The run's own would be trained first."""
    (tmp_path / "out.control").mkdir()
    (tmp_path / "out.control" / "notes").touch()
    code, err = finetune(tmp_path / "out", "--against", "control")
    assert code == 1 and "out.control exists and is not empty" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--own-texts", 9), "--own-texts does nothing while --lambda-replay is 0"),
        (("--own-texts", 9, "--lambda-replay", 1, "--anchor-data", "far.jsonl"), "--anchor-data"),
        (("--train", "router"), "--lora-rank does nothing while --train is router"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(finetune, tmp_path, more, said):
    """Before anything is read; the place's own options set a rank and replay nothing."""
    code, err = finetune(tmp_path / "out", *more)
    assert code == 1 and said in err and "leave it out" in err


def test_an_outcome_beside_another_control_is_measured_again(tmp_path, monkeypatch):
    """The one that was measured is told by its fingerprint; one that is gone is not missed."""
    outcome = {"control": {}, "control_run": {"fingerprint": "a"}}
    records = {
        "one": {"fingerprint": "a"},
        "two": {"fingerprint": "b"},
        "out": {"outcome": outcome},
    }
    monkeypatch.setattr("melinoe.checkpoint.read_metadata", lambda path: records[path.name])
    for name in records:
        (tmp_path / name).mkdir()
    found = {name: _is_measured(tmp_path / "out", tmp_path / name) for name in ("one", "two", "no")}
    assert found == {"one": True, "two": False, "no": True}
    assert _is_measured(tmp_path / "out", None)
