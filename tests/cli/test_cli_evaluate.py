"""`melinoe evaluate`, `card` and what `finetune` measures: the same offloaded, and read on."""

import io
import json
import shutil
import sys
from contextlib import redirect_stdout
from functools import partial

import pytest
from data_rows import write
from small_olmoe import tiny_model, words_tokenizer, write_checkpoint
from tokenizers import pre_tokenizers

from melinoe.checkpoint import read_metadata
from melinoe.cli import main
from melinoe.config import OutcomeSettings
from melinoe.errors import DataError
from melinoe.report import read_records, write_report


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny random models, and questions that one token answers."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("ours", 0), ("theirs", 3)):
        write_checkpoint(root / name, seed)
    rows = [{"question": f"w{i} w{i + 1}", "answer": f"w{i} #### {i}"} for i in range(2, 12)]
    write(root / "questions.jsonl", *rows)
    rows = [{"prompt": f"w{i}", "completion": f"w{i + 1} w4"} for i in range(2, 27)]
    write(root / "prompts.jsonl", *rows)
    (root / "far").mkdir()
    for name in ("a", "b"):
        text = "".join(json.dumps({"text": f"w{i} w9 w{i + 2}"}) + "\n" for i in range(3, 9))
        (root / "far" / f"{name}.jsonl").write_text(text)
    return root


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """What fine-tuning measures by itself is kept short, and its figures undrawn: none is read."""
    small = partial(OutcomeSettings, prompts=3, max_new_tokens=4)
    monkeypatch.setattr("melinoe.outcome.record.OutcomeSettings", small)
    monkeypatch.setattr("melinoe.report.card.figures_of", lambda records: [])


def everything(models, *more):
    return (
        *("evaluate", models / "ours", models / "theirs", "--data", models / "questions.jsonl"),
        *("--other", models / "far", "--locality", "--prompts", 4),
        *("--at-slots", 2, "--max-new-tokens", 6, *more),
    )


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    """Everything of both models, once: where its records are, and what people were told."""
    out, told = tmp_path_factory.mktemp("evaluated") / "runs.jsonl", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.setattr(sys, "argv", ["melinoe", *map(str, everything(models, "--out", out))])
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop
    return out, told.getvalue()


def test_an_offloaded_model_gives_every_number_of_the_resident_one(models, melinoe):
    """Two slots, LFU, experts on disk, against all resident in RAM: the same JSON."""
    few = melinoe(*everything(models, "--slots", 2, "--policy", "lfu", "--store", "disk", "--json"))
    many = melinoe(*everything(models, "--slots", 8, "--store", "ram", "--json"))
    assert few[0] == many[0] == 0, few[2]
    assert json.loads(few[1]) == json.loads(many[1])
    kinds = [record["kind"] for record in json.loads(few[1])]
    # Of each model three texts, and locality of what it wrote and what it read.
    assert [kinds.count(k) for k in ("quality", "locality", "curve")] == [6, 4, 8]
    # Three perplexities, and transfers: written and read, under two policies.
    assert kinds.count("comparison") == 3 + 4


def test_people_get_a_table_and_sentences(evaluated):
    """Each comparison says which is better, or that none is shown to be."""
    out = evaluated[1]
    assert "means with 95 % intervals" in out
    sentences = [line for line in out.splitlines() if " against " in line]
    assert len(sentences) == 7
    assert all(line.endswith((" is better", "neither is shown to be better")) for line in sentences)
    assert out.count("all completions together use") == 4


def test_records_are_appended_and_make_a_report(evaluated, models, melinoe, tmp_path):
    """A second run's lines come after the first one's; the page shows comparisons."""
    out = tmp_path / "runs.jsonl"
    shutil.copy(evaluated[0], out)
    code, _, err = melinoe(
        *("evaluate", models / "ours", models / "theirs", "--data", models / "questions.jsonl"),
        *("--limit", 3, "--out", out),
    )
    assert code == 0, err
    assert out.read_text().startswith(evaluated[0].read_text())
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == (6 + 4 + 8 + 7) + (2 + 1) and all(line["machine"] for line in lines)
    assert not read_records(out).notes  # every kind is known
    write_report([out], tmp_path / "page.html")
    page = (tmp_path / "page.md").read_text()
    assert "perplexity, questions: ours against theirs" in page


def test_a_choice_is_priced_against_the_exact_one(models, melinoe, tmp_path):
    """Per model and text its price and saving; then the two models, both with exact choices."""
    code, out, err = melinoe(
        *("evaluate", models / "ours", models / "theirs", "--data", models / "questions.jsonl"),
        *("--slots", 3, "--choice", "cache-prior", "--choice-strength", 2, "--json"),
    )
    assert code == 0, err
    records = json.loads(out)
    said = [(r["metric"], r["model"], r["other"]) for r in records if r["kind"] == "comparison"]
    moved = "transfers per decoded token (LFU, 3 slots)"
    changed = "ours, cache-prior 2"
    assert said == [
        ("perplexity", changed, "ours"),
        (moved, changed, "ours"),
        ("perplexity", "theirs, cache-prior 2", "theirs"),
        (moved, "theirs, cache-prior 2", "theirs"),
        ("perplexity", "ours", "theirs"),
    ]
    out = tmp_path / "runs.jsonl"
    code, table, err = melinoe(
        *("evaluate", models / "ours", "--data", models / "questions.jsonl", "--slots", 3),
        *("--choice", "cache-prior", "--choice-strength", 0.5, "--out", out),
    )
    assert code == 0, err
    assert (
        "".join(table.split()).count("(LFU,3") >= 2
        and "ours, cache-prior 0.5 against ours" in table
    )
    write_report([out], tmp_path / "page.html")
    assert "no task was scored" in (tmp_path / "page.md").read_text()
    code, _, err = melinoe(
        *("evaluate", models / "none", "--data", models / "questions.jsonl", "--choice", "nearest")
    )
    assert code == 1 and "there is no choice 'nearest'" in err  # before any model is read


def test_what_does_not_go_together_is_wrong_usage(models, melinoe):
    """Nothing to measure; a model against itself."""
    ours = models / "ours"
    for arguments in (
        ("evaluate", ours),
        ("evaluate", ours, ours, "--data", models / "questions.jsonl"),
    ):
        code, out, _ = melinoe(*arguments)
        assert (code, out) == (2, "")


def test_finetune_measures_before_and_after_and_writes_the_card(models, melinoe, tmp_path):
    """With held-out data: outcome, origin, card; a base's path is in none of the files."""
    out = tmp_path / "tuned"
    code, _, err = melinoe(
        *("finetune", models / "ours", "--data", models / "prompts.jsonl", "--out", out),
        *("--eval-data", models / "questions.jsonl", "--other", models / "far" / "a.jsonl"),
        *("--steps", 2, "--batch-size", 4, "--learning-rate", 0.01, "--lora-rank", 2),
        *("--lambda-replay", 0),
    )
    assert code == 0, err
    metadata = read_metadata(out)
    assert metadata["base"] == "ours" and metadata["data"]["examples"] == 25
    assert metadata["outcome"]["examples"] == 10 and metadata["outcome"]["slots"] == 2
    assert set(metadata["outcome"]["change"]["perplexity"]) == {"questions", "a"}
    card = (out / "README.md").read_text()
    assert "## What fine-tuning changed" in card
    assert str(models) not in card + json.dumps(metadata)
    before = card
    assert melinoe("card", out)[0] == 0
    assert (out / "README.md").read_text() == before


def test_finetune_holds_examples_out_and_never_trains_on_them(models, melinoe, tmp_path):
    """Two fifths of 25 rows, evenly spread; too few to hold out is said, and all are trained on."""
    common = ("finetune", models / "ours", "--data", models / "prompts.jsonl", "--steps", 1)
    common += ("--lora-rank", 2, "--lambda-replay", 0, "--batch-size", 4)
    code, _, err = melinoe(*common, "--out", tmp_path / "a", "--hold-out", 0.4, "--no-measure")
    assert code == 0, err
    data = read_metadata(tmp_path / "a")["data"]
    assert (data["examples"], data["held_out"]) == (15, 10)
    assert "outcome" not in read_metadata(tmp_path / "a")
    code, _, err = melinoe(*common, "--out", tmp_path / "b")
    assert code == 0 and "too few examples to hold some out" in err
    assert read_metadata(tmp_path / "b")["data"]["examples"] == 25


def test_only_the_first_process_measures(models, melinoe, tmp_path, monkeypatch):
    """The others of a distributed run leave the checkpoint to it."""
    from melinoe.cli import finetune, texts

    monkeypatch.setenv("RANK", "1")
    finetune.finish(tmp_path, "x", "y", "train", texts.HeldOut([], "y"))
    assert list(tmp_path.iterdir()) == []


def test_other_texts_of_one_name_are_all_kept_and_an_empty_directory_is_refused(models, tmp_path):
    """Two files called a.jsonl; a text called as the held-out data; a directory without texts."""
    from melinoe.cli.texts import hold_out

    far = models / "far"
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "a.jsonl").write_text('{"text": "w3 w4"}\n')
    others = [str(far), str(tmp_path / "near"), str(models / "questions.jsonl")]
    held = hold_out("x", [], str(models / "questions.jsonl"), "test", others, 0.1)
    assert held.domain == "questions"
    same = str(tmp_path / "near" / "a.jsonl")
    assert {name: len(text) for name, text in held.others.items()} == {
        "a": 6, "b": 6, same: 1, str(models / "questions.jsonl"): 10
    }  # fmt: skip
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl, "):
        hold_out("x", [], None, "test", [str(tmp_path / "none")], 0.1)


def test_options_that_nothing_would_use_are_wrong_usage(models, melinoe):
    """Of caches without locality."""
    text = ("--data", models / "questions.jsonl")
    code, out, _ = melinoe("evaluate", models / "ours", *text, "--at-slots", 2)
    assert (code, out) == (2, "")


def test_what_was_measured_is_kept_where_two_models_cannot_be_compared(models, melinoe, tmp_path):
    """Unlike tokenizers: one sentence and exit 1, and the records of both models in the file."""
    other = tmp_path / "other"
    tiny_model(1).save_pretrained(other)
    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save_pretrained(other)
    out = tmp_path / "runs.jsonl"
    code, _, err = melinoe(
        *("evaluate", models / "ours", other, "--data", models / "prompts.jsonl", "--out", out)
    )
    assert code == 1 and "different texts" in err.splitlines()[-1]
    assert [json.loads(line)["model"] for line in out.read_text().splitlines()] == ["ours", "other"]


def test_models_are_let_go_one_by_one_and_never_made_whole(models, melinoe, monkeypatch):
    """An offloaded model may be larger than memory: its experts are not put back at the end."""
    import weakref

    from melinoe.cli import models as opening_models
    from melinoe.engine import handle

    def refuse(*_):
        raise AssertionError("all experts were put back into memory")

    opened, open_model = [], opening_models.open_model

    def opening(*arguments, **more):
        assert all(ref() is None for ref in opened)
        found = open_model(*arguments, **more)
        opened.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(handle, "give_weights_back", refuse)
    monkeypatch.setattr(opening_models, "open_model", opening)
    code, _, err = melinoe(
        *("evaluate", models / "ours", models / "theirs", "--slots", 2, "--store", "disk"),
        *("--data", models / "prompts.jsonl", "--limit", 2),
    )
    assert code == 0, err
    assert len(opened) == 2
