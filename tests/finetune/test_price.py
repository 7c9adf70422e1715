"""The search for the strongest cache term within a price."""

import json
import math
import os

import numpy as np
import pytest
import torch
from forked import run
from small_runs import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import melinoe.finetune.price as price_module
import melinoe.finetune.run as run_module
from melinoe.checkpoint import read_metadata
from melinoe.data import Example, encode
from melinoe.errors import DataError, OutputExistsError, TrainingError
from melinoe.finetune import finetune
from melinoe.finetune.price import (
    Price,
    describe,
    finetune_within,
    halves,
    next_strength,
    parse_increase,
    text_costs,
)

WORDS = ("a", "the", "an", "one", "no", "some", "my", "your", "our")
CHOSEN = {"steps": 2, "batch_size": 3}


def sentences(words, source):
    return [Example("what? ", f"{word} is it.", f"{source}:{i}") for i, word in enumerate(words)]


def within(place, out="out", changes=None, **options):
    """A search on the fixture's checkpoint, of two runs at most."""
    return finetune_within(
        place / "base",
        options.pop("data", sentences(WORDS, "train")),
        place / out,
        settings(**CHOSEN | (changes or {})),
        options.pop("price", Price(0.01)),
        **{"eval_examples": sentences(WORDS[::-1], "eval"), "runs": 2} | options,
    )


@pytest.mark.parametrize(
    ("text", "share"), [("1%", 0.01), ("0.01", 0.01), (" 250 % ", 2.5), ("0.9", 0.9)]
)
def test_an_increase_is_read_as_a_share(text, share):
    """With a percent sign or without."""
    assert parse_increase(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "0", "-1%", "nan", "inf%", "much"])
def test_an_increase_that_says_nothing_is_refused(text):
    """A bare 1 may mean either; the rest leaves nothing to spend or is no number."""
    with pytest.raises(TrainingError, match="increase of"):
        parse_increase(text)


def test_the_next_weight_follows_the_power_law_through_the_nearest_runs():
    """Worked by hand: spent = weight^2 is hit in one step from two runs; one run assumes 1.2."""
    assert next_strength([(1.0, 1.0), (2.0, 4.0)]) == pytest.approx(math.sqrt(0.85))
    assert next_strength([(1.0, 0.5)]) == pytest.approx((0.85 / 0.5) ** (1 / 1.2))
    assert next_strength([(1.0, 1e9)]) == pytest.approx(1 / 8)  # never further than 8 times
    assert next_strength([(1.0, -3.0)]) == pytest.approx(8.0)  # noise: a small gap


def test_every_second_text_with_a_completion_chooses(checkpoint):
    """One text is all prompt within twelve tokens, and in neither half."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "base")
    examples = sentences(("a", "b", "c", "d"), "x")
    examples.insert(1, Example("this prompt is too long", "x", "x:long"))
    choosing, judging = halves(examples, tokenizer, 20)
    assert [one.completion[0] for one in choosing] == ["a", "c"]
    assert [one.completion[0] for one in judging] == ["b", "d"]


def test_texts_cost_what_the_library_says(checkpoint):
    """Each text's loss against transformers' own mean for that text alone."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "base")
    texts = encode(sentences(WORDS, "x"), tokenizer, 32)
    found = text_costs(model, texts, settings(batch_size=4))
    for text, nll, tokens in zip(texts, found["nll"], found["tokens"], strict=True):
        pairs = zip(text.input_ids, text.completion_mask, strict=True)
        labels = [token if counts else -100 for token, counts in pairs]
        with torch.no_grad():
            own = model(torch.tensor([text.input_ids]), labels=torch.tensor([labels])).loss
        assert nll / tokens == pytest.approx(float(own), rel=1e-4)


def test_a_search_leaves_its_best_run_and_its_control(checkpoint):
    """The record has every run; the spent share is the gap of the choosing texts, by hand."""
    result = within(checkpoint, price=Price(0.0001))
    price = result.metadata["price"]
    assert price == json.loads((checkpoint / "out" / "melinoe.json").read_text())["price"]
    assert result.metadata["settings"]["lambda_cache"] == price["strength"]
    assert len(price["runs"]) in (1, 2) and price["bounds"] == {"own": 0.0001}
    assert "costs" not in read_metadata(checkpoint / "out")
    control = read_metadata(checkpoint / "out.control")
    assert control["is_control"] and control["costs"]["own"]["tokens"]
    left = sorted(path.name for path in checkpoint.iterdir())
    assert left == ["base", "data.jsonl", "out", "out.control"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "base")
    texts = encode(sentences(WORDS[::-1], "eval")[::2], tokenizer, 32)
    ours, theirs = text_costs(model, texts, settings()), control["costs"]["own"]
    gap = (np.sum(ours["nll"]) - np.sum(theirs["nll"])) / np.sum(theirs["tokens"])
    # The written model is rounded to bfloat16, the measured one was not.
    assert gap / math.log1p(0.0001) == pytest.approx(price["spent"], abs=20)
    assert describe(price).startswith("lambda_cache ")


def test_the_strongest_run_within_the_price_is_kept(checkpoint, monkeypatch):
    """Spent 2, .3 and .7 of the budget: the third ends the search. If none is within: the least."""
    spent = iter([2.0, 0.3, 0.7])

    def pretend(*_):
        share = next(spent)
        return {"spent": share, "spent_at_most": share, "feasible": share < 1}

    monkeypatch.setattr(price_module, "_spent", pretend)
    result = within(checkpoint, runs=4)
    tried = result.metadata["price"]["runs"]
    assert [one["spent"] for one in tried] == [2.0, 0.3, 0.7]
    assert tried[0]["strength"] == 1.0 > tried[2]["strength"] > tried[1]["strength"]
    assert result.metadata["price"]["spent"] == 0.7
    assert "of 3 runs the strongest within the price; it spent 70%" in describe(
        result.metadata["price"]
    )
    spent = iter([9.0, 4.0])
    result = within(checkpoint, "b")
    assert result.metadata["price"]["spent"] == 4.0
    assert (
        "none of 2 runs was within the price, and this one came nearest; it spent 400%"
        in describe(result.metadata["price"])
    )


def test_an_interrupted_search_goes_on_where_it_was(checkpoint, monkeypatch):
    """Stopped in its second run: the control and the first are not trained again."""
    calls, real = [], run_module.train

    def failing(*args, **kwargs):
        calls.append(kwargs["checkpoints"].stem)
        if calls.count("2") == 1 and calls[-1] == "2":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(run_module, "train", failing)
    monkeypatch.setattr(price_module, "_NEAR", math.inf)
    with pytest.raises(KeyboardInterrupt):
        within(checkpoint)
    with pytest.raises(OutputExistsError):
        within(checkpoint)
    with pytest.raises(TrainingError, match="not measured on these held-out texts"):
        within(checkpoint, resume=True, eval_examples=sentences(WORDS, "other"))
    result = within(checkpoint, resume=True)
    assert calls == ["out.control", "1", "2", "2"]
    assert len(result.metadata["price"]["runs"]) == 2 and (checkpoint / "out").is_dir()
    assert within(checkpoint, resume=True).metadata["price"] == result.metadata["price"]
    for price, fault in ((Price(0.02), "0.01 on own"), (Price(0.01, 0.1), "and 0.1 on other")):
        with pytest.raises(TrainingError, match=f"was trained within .*{fault}"):
            within(checkpoint, resume=True, price=price, other_examples=sentences(WORDS, "o"))
    with pytest.raises(TrainingError, match="another data"):
        within(checkpoint, resume=True, data=sentences(WORDS[:5], "train"))


def test_settings_that_a_price_cannot_be_kept_with_are_refused(checkpoint):
    """No cache term; no text of other domains; weights from before the end; too few texts."""
    for changes, options, said in (
        ({"lambda_cache": 0.0}, {}, "lambda_cache is 0"),
        ({}, {"price": Price(0.01, 0.02)}, "needs text of theirs"),
        ({"keep": "best"}, {}, "leave keep at last"),
    ):
        with pytest.raises(TrainingError, match=said):
            within(checkpoint, changes=changes, **options)
    with pytest.raises(DataError, match="5 held-out texts are too few"):
        within(checkpoint, eval_examples=sentences(WORDS[:5], "eval"))
    with pytest.raises(TrainingError, match="leaves nothing to spend"):
        Price(0.0)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["base", "data.jsonl"]


def test_a_run_without_a_price_is_no_result_of_a_search(checkpoint):
    """Resumed with a price, it is refused as what it is."""
    finetune(checkpoint / "base", sentences(WORDS, "train"), checkpoint / "out", settings(**CHOSEN))
    with pytest.raises(
        TrainingError, match=r"was trained without a price, not within 0\.01 on own"
    ):
        within(checkpoint, resume=True)


def test_a_run_with_another_strength_is_none_of_the_search(checkpoint):
    """What lies in OUT.runs began otherwise."""
    finetune(
        checkpoint / "base", sentences(WORDS, "train"), checkpoint / "out.runs" / "1",
        settings(**CHOSEN, lambda_cache=2.0),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="1 is a run with another strength"):
        within(checkpoint, resume=True)


def test_a_place_that_is_taken_is_said_before_any_training(checkpoint):
    """The control's, where a teacher would be trained first."""
    (checkpoint / "out.control").mkdir()
    (checkpoint / "out.control" / "notes").touch()
    with pytest.raises(OutputExistsError, match=r"out\.control exists"):
        within(checkpoint, changes={"lambda_match": 1.0}, teacher="plain")
    assert not (checkpoint / "out.teacher").exists()


def test_other_texts_choose_only_where_they_are_bounded(checkpoint, monkeypatch):
    """Three would be too few to choose by; without a bound they are not read."""
    few, seen = sentences(WORDS[:3], "far"), []
    monkeypatch.setattr(price_module, "_Costs", lambda texts: seen.append([*texts]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        within(checkpoint, other_examples=few)
    assert seen == [["own"]]
    with pytest.raises(DataError, match="3 held-out texts are too few"):
        within(checkpoint, other_examples=few, price=Price(0.01, 0.1))


def test_two_processes_find_what_one_finds(checkpoint):
    """With a teacher, which control and runs share: the same strengths and shares spent."""

    def search(out, batch_size):
        changes = {"batch_size": batch_size, "lambda_match": 1.0}
        result = within(checkpoint, out, changes, teacher="plain", runs=1)
        if os.environ.get("RANK", "0") == "0":
            (checkpoint / f"{out}.json").write_text(json.dumps(result.metadata["price"]))

    search("one", 4)
    assert run(lambda: search("two", 2), processes=2) == [0, 0]
    one, two = (json.loads((checkpoint / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["spent"] == pytest.approx(one["spent"], rel=2e-2, abs=1e-3)
    kept = {path.name for path in checkpoint.iterdir() if path.is_dir()} - {"base"}
    assert kept == {
        f"{run}{what}" for run in ("one", "two") for what in ("", ".control", ".teacher")
    }
    records = [read_metadata(checkpoint / name) for name in ("one", "one.control")]
    assert records[0]["teacher"] == records[1]["teacher"] and records[0]["teacher"] is not None
