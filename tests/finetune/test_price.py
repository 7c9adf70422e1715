"""Runs within a price: steered or searched, settled, judged at the end, gone on with."""

import json
import math

import numpy as np
import pytest
from small_runs import examples, settings
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import melinoe.finetune.price.search as price_module
from melinoe.data import Example
from melinoe.errors import OutputExistsError, TrainingError
from melinoe.finetune import train
from melinoe.finetune.price.panel import OTHER, OWN, Panel
from melinoe.finetune.price.reading import Cost, Loads, read
from melinoe.finetune.price.reference import Reference, ReferenceCallback
from melinoe.finetune.price.search import describe, finetune_within
from melinoe.finetune.price.steering import Price, PriceCallback

# ---- a run within a price ----


CHOSEN = settings(steps=12, lambda_cache=4.0, anchor="none")


@pytest.fixture(scope="module")
def reference_run():
    """Texts, what the control left, and its model; the texts are those it trained on.

    So random a model learns nothing that helps with other text; here the cache term costs.
    """
    panel, model = Panel.of(examples(12), examples(12, seed=6), steering=4), tiny_model("olmoe")
    watch = ReferenceCallback(panel, 2)
    train(model, examples(12), CHOSEN.control(), pad_token_id=0, callbacks=[watch])
    return panel, watch.reference({}), model


def run_within(reference_run, price, steered=True):
    """The callback of a run with *price*, and its model."""
    panel, reference, _ = reference_run
    model = tiny_model("olmoe")
    callback = PriceCallback(panel, price, reference, 4.0, steered=steered)
    train(model, examples(12), CHOSEN, pad_token_id=0, callbacks=[callback])
    return callback, model


def test_the_weight_follows_the_gap_and_the_end_is_judged_on_other_texts(reference_run):
    """Too strong a start: the weight falls; every figure equals one taken from the models."""
    panel, reference, theirs = reference_run
    callback, ours = run_within(reference_run, Price(0.001, 0.5))
    steps = [row["step"] for row in callback.history]
    assert steps == [2, 4, 6, 8, 10, 12] == list(reference.curve)
    assert callback.history[0]["strength"] == 4.0 and callback.strength < 4.0
    assert callback.trainer.locality.lambda_cache == callback.strength
    outcome = callback.metadata()["price"]
    for name in (OWN, OTHER):
        costs = [read(one, panel.judging[name], settings())[0] for one in (ours, theirs)]
        increase = math.exp(costs[0].mean - costs[1].mean) - 1
        assert outcome["paid"][name]["mean"] == pytest.approx(increase, rel=1e-3, abs=1e-6)
        costs = [read(one, panel.steering[name], settings())[0] for one in (ours, theirs)]
        gap = callback.history[-1][f"gap_{name}"]
        assert gap == pytest.approx(costs[0].mean - costs[1].mean, rel=1e-3, abs=1e-6)
    spent = []
    for name, bound in outcome["bounds"].items():
        costs = [read(one, panel.choosing[name], settings())[0] for one in (ours, theirs)]
        spent.append((costs[0].mean - costs[1].mean) / math.log1p(bound))
    assert outcome["spent"] == pytest.approx(max(spent), rel=1e-3) and not outcome["feasible"]
    assert outcome["spent"] < outcome["spent_at_most"]
    assert outcome["met"] is (outcome["paid"][OWN]["mean"] <= 0.001)
    assert "this is the nearest" in describe(outcome)


def test_a_weight_that_is_not_steered_stays(reference_run):
    """Same start, generous price: unsteered it stays at 4, steered it rises."""
    stays, _ = run_within(reference_run, Price(5.0), steered=False)
    assert {row["strength"] for row in stays.history} == {4.0} == {stays.strength}
    rises, _ = run_within(reference_run, Price(5.0))
    assert rises.strength > 4.0
    for callback in (stays, rises):
        assert callback.outcome["feasible"] and callback.outcome["met_by_the_whole_interval"]
        assert set(callback.history[0]) == {"step", "strength", "gap_own"}


def test_a_price_above_its_bound_is_said_plainly():
    """The judging texts cost more than was allowed: "ABOVE", and not met."""
    callback = PriceCallback.__new__(PriceCallback)
    cost = Cost(np.array([10.0, 12.0, 9.0]), np.array([5.0, 6.0, 4.0]))
    worse = Cost(cost.nll * 1.05, cost.tokens)
    loads = Loads({"lru": np.ones(3), "lfu": np.ones(3)}, cost.tokens)
    callback.reference = Reference({}, 1, {}, {OWN: cost}, {OWN: cost}, loads, loads)
    callback.price, callback.history = Price(0.01), []
    callback.steered, callback.strength = False, 0.5
    outcome = callback._outcome({OWN: cost}, {OWN: worse}, loads)
    assert outcome["feasible"] and outcome["spent"] == outcome["spent_at_most"] == 0
    assert not outcome["met"] and "ABOVE the bound of 1 %" in describe(outcome)
    assert outcome["times_fewer_than"]["base"]["lru"]["mean"] == 1.0


# ---- from files to files ----


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny OLMoE with a tokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz .?"
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i for i, c in enumerate(letters, 3)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def sentences(words, source):
    return [Example("what? ", f"{word} is it.", f"{source}:{i}") for i, word in enumerate(words)]


WORDS = ("a", "the", "an", "one", "no", "some", "my", "your", "our")


def within(checkpoint, out="out", **options):
    options = {"settings": settings(steps=4, batch_size=3), "price": Price(0.01)} | options
    return finetune_within(
        checkpoint / "base",
        options.pop("data", sentences(WORDS, "train")),
        checkpoint / out,
        eval_examples=sentences(WORDS[::-1], "eval"),
        every=2,
        **options,
    )


def test_a_reference_is_made_once_and_used_again(checkpoint, monkeypatch):
    """The second call makes none, and finds the same; the record has every run and its price."""
    calls = []
    real = price_module.finetune
    monkeypatch.setattr(
        price_module, "finetune", lambda *a, **k: calls.append(a[2].name) or real(*a, **k)
    )
    first = within(checkpoint, runs=2)
    assert calls[0] == "out.reference" and calls[1:] in (["1"], ["1", "2"])
    tries = len(calls) - 1
    again = within(checkpoint, "again", runs=2, reference=checkpoint / "out.reference")
    assert len(calls) == 1 + 2 * tries
    record = json.loads((checkpoint / "out" / "melinoe.json").read_text())
    assert record["price"] == json.loads(json.dumps(first.metadata["price"]))
    assert again.metadata["price"]["paid"] == first.metadata["price"]["paid"]
    assert len(record["price"]["runs"]) == tries
    assert record["settings"]["lambda_cache"] == record["price"]["strength"]
    control = json.loads((checkpoint / "out.reference" / "melinoe.json").read_text())
    assert control["settings"]["lambda_cache"] == 0
    left = sorted(path.name for path in checkpoint.iterdir())
    assert left == ["again", "base", "out", "out.reference"]


def test_the_strongest_run_within_the_price_is_kept(checkpoint, monkeypatch):
    """Spent 2, .3 and .7 of the budget: the third ends the search. If none is within: the least."""
    spent = iter([2.0, 0.3, 0.7])
    outcome = PriceCallback._outcome

    def pretend(self, *args):
        share = next(spent)
        return outcome(self, *args) | {
            "spent": share,
            "spent_at_most": share,
            "feasible": share < 1,
        }

    monkeypatch.setattr(PriceCallback, "_outcome", pretend)
    result = within(checkpoint)
    tried = result.metadata["price"]["runs"]
    assert [one["spent"] for one in tried] == [2.0, 0.3, 0.7]
    assert tried[0]["strength"] == 1.0 > tried[2]["strength"] > tried[1]["strength"]
    assert result.metadata["price"]["spent"] == 0.7
    spent = iter([9.0, 4.0])
    result = within(checkpoint, "b", reference=checkpoint / "out.reference", runs=2)
    assert result.metadata["price"]["spent"] == 4.0
    assert "no run was within the price" in describe(result.metadata["price"])


def test_an_interrupted_search_goes_on_where_it_was(checkpoint, monkeypatch):
    """Stopped in its second run: the reference and the first are not trained again."""
    calls, real = [], price_module.finetune

    def failing(*args, **kwargs):
        calls.append(args[2].name)
        if calls.count("2") == 1 and args[2].name == "2":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(price_module, "finetune", failing)
    monkeypatch.setattr(price_module, "_is_near", lambda outcome: False)
    with pytest.raises(KeyboardInterrupt):
        within(checkpoint, runs=2)
    with pytest.raises(OutputExistsError):
        within(checkpoint, runs=2)
    result = within(checkpoint, runs=2, resume=True)
    assert calls == ["out.reference", "1", "2", "2"]
    assert len(result.metadata["price"]["runs"]) == 2 and (checkpoint / "out").is_dir()


def test_a_reference_of_another_run_is_refused(checkpoint):
    """Other data, another setting, a damaged file, none at all: each says what and the way out."""
    within(checkpoint, steered=True)
    reference = checkpoint / "out.reference"
    with pytest.raises(TrainingError, match="another data"):
        within(checkpoint, "b", reference=reference, data=sentences(WORDS[:5], "train"))
    with pytest.raises(TrainingError, match="trained with seed 0, this run with 1"):
        within(
            checkpoint, "b", reference=reference, settings=settings(steps=4, batch_size=3, seed=1)
        )
    with pytest.raises(TrainingError, match="is no reference of a price"):
        within(checkpoint, "b", reference=checkpoint / "base")
    with pytest.raises(OutputExistsError):
        within(checkpoint, "out")
    (reference / "price_reference.json").write_text("{torn")
    with pytest.raises(TrainingError, match="is damaged"):
        within(checkpoint, "b", reference=reference)
    assert not (checkpoint / "b").exists()


def test_settings_that_a_price_cannot_be_kept_with_are_refused(checkpoint):
    """No cache term; other domains bounded without text of theirs; weights from before the end."""
    for wrong, said in (
        ({"settings": settings(lambda_cache=0.0)}, "lambda_cache is 0"),
        ({"price": Price(0.01, 0.02)}, "needs text of theirs"),
        ({"settings": settings(keep="best")}, "leave keep at last"),
    ):
        with pytest.raises(TrainingError, match=said):
            within(checkpoint, **wrong)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["base"]


def test_callbacks_go_on_from_their_states(reference_run):
    """Through JSON: the reference's curve and loads, the price's history and weight."""
    panel, reference, _ = reference_run
    callback, _ = run_within(reference_run, Price(0.01))
    again = PriceCallback(panel, Price(0.01), reference, 4.0, steered=True)
    again.trainer = callback.trainer
    again.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert again.history == callback.history
    assert again.strength == callback.strength == again.trainer.locality.lambda_cache
    assert again.controller.state_dict() == callback.controller.state_dict()
    watch = ReferenceCallback(panel, 2)
    watch.curve, watch.loads = dict(reference.curve), {"base": reference.base}
    other = ReferenceCallback(panel)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert other.every == 2 and other.curve.keys() == watch.curve.keys()
    assert np.array_equal(other.curve[4][OWN].nll, watch.curve[4][OWN].nll)
    assert np.array_equal(other.loads["base"].loads["lfu"], reference.base.loads["lfu"])
