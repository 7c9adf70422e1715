"""The price of locality: named by the user, kept by a controller, settled and judged at the end."""

import json
import math

import numpy as np
import pytest
import torch
from small_runs import examples, settings
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import melinoe.finetune.price.search as price_module
from melinoe.data import Example
from melinoe.errors import DataError, OutputExistsError, TrainingError
from melinoe.finetune import train
from melinoe.finetune.price.panel import OTHER, OWN, Panel
from melinoe.finetune.price.reading import Cost, Loads, read
from melinoe.finetune.price.reference import Reference, ReferenceCallback
from melinoe.finetune.price.search import describe, finetune_within
from melinoe.finetune.price.steering import Price, PriceCallback
from melinoe.finetune.price.strength import StrengthController, next_strength, parse_increase
from melinoe.moe.routing import RoutingRecorder, find_routers

# ---- the price, and the controller ----


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), ("0.01", 0.01), (0.03, 0.03), (" 2.5 % ", 0.025), ("150%", 1.5)],
)
def test_an_increase_is_a_share_or_a_percentage(text, share):
    """Both spellings mean the same number."""
    assert parse_increase(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "0", "-1%", "much", "nan", "inf%"])
def test_an_increase_that_means_nothing_is_refused(text):
    """A bare 1 could be 1 % or 100 %; the message says how to write it."""
    with pytest.raises(TrainingError, match="write"):
        parse_increase(text)


def test_one_update_worked_by_hand():
    """Budget .01, gap .012, target .8: u = 1.2, e = -.4; weight .5 exp(.1 x -.4).

    Then gap .004: u = (1.2 + .4) / 2 = .8, e = 0, change .4: times exp(.1 x 0 + .2 x .4).
    """
    controller = StrengthController(
        0.5, {"own": 0.01}, target=0.8, integral=0.1, proportional=0.2, smoothing=0.5
    )
    first = controller.update({"own": 0.012})
    assert first == pytest.approx(0.5 * math.exp(-0.04))
    assert controller.update({"own": 0.004}) == pytest.approx(first * math.exp(0.08))


def test_the_budget_that_is_spent_most_decides():
    """Own text has room, other text has none: the weight falls."""
    controller = StrengthController(0.5, {"own": 0.01, "other": 0.03})
    assert controller.update({"own": 0.0, "other": 0.06}) < 0.5


def test_the_weight_stays_between_floor_and_ceiling_and_nan_moves_nothing():
    """However long the gap is one-sided; and what is not finite is no measurement."""
    controller = StrengthController(1.0, {"own": 0.01}, floor=0.1, ceiling=4.0)
    for _ in range(99):
        controller.update({"own": 9.0})
    assert controller.strength == 0.1
    assert controller.update({"own": math.nan}) == 0.1
    for _ in range(99):
        controller.update({"own": -9.0})
    assert controller.strength == 4.0


@pytest.mark.parametrize("start", [0.02, 0.5, 8.0])
@pytest.mark.parametrize("exponent", [0.7, 1.2, 2.0])
def test_the_controller_settles_where_the_budget_is_spent(start, exponent):
    """A plant that answers late and noisily: gap follows k strength^exponent with a lag.

    After 60 measurements the mean gap of the next 20 is between 60 and 105 % of the budget.
    """
    noise = np.random.default_rng(0)
    controller, gap, late = StrengthController(start, {"own": 0.01}), 0.0, []
    for turn in range(80):
        gap += 0.4 * (0.03 * controller.strength**exponent - gap)
        controller.update({"own": gap + 0.001 * noise.standard_normal()})
        if turn >= 60:
            late.append(gap)
    assert 0.006 < np.mean(late) < 0.0105


def test_a_controller_goes_on_from_its_state():
    """Through JSON, the continuation is the same number for number."""
    first, second = (StrengthController(0.5, {"own": 0.01}) for _ in range(2))
    for gap in (0.02, 0.004, 0.013):
        first.update({"own": gap})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for gap in (0.001, 0.03):
        assert first.update({"own": gap}) == second.update({"own": gap})


def test_the_next_strength_worked_by_hand():
    """Half the target spent at .4 and exponent 1: .8. Four times it: .1. Far off: eight times.

    Two runs: spent .8 at .5 and 3.2 at 1, exponent 2: the target .2 is a factor of 2 below .5.
    """
    one = {"target": 0.8, "slope": 1.0}
    assert next_strength([(0.4, 0.4)], **one) == pytest.approx(0.8)
    assert next_strength([(0.4, 3.2)], **one) == pytest.approx(0.1)
    assert next_strength([(0.4, -1.0)], **one) == pytest.approx(3.2)
    assert next_strength([(0.5, 0.8), (1.0, 3.2)], target=0.2) == pytest.approx(0.25)


@pytest.mark.parametrize("exponent", [0.7, 1.2, 2.0])
@pytest.mark.parametrize("right", [0.02, 0.2, 3.0])
def test_the_search_is_near_within_four_runs(exponent, right):
    """Started at .5, a run's cost a power of the weight with 5 % noise: one spends .65 to 1."""
    noise, tried, weight = np.random.default_rng(1), [], 0.5
    for _ in range(4):
        spent = 0.85 * (weight / right) ** exponent * (1 + 0.05 * noise.standard_normal())
        tried.append((weight, spent))
        weight = next_strength(tried)
    assert any(0.65 <= spent <= 1 for _, spent in tried), tried


# ---- texts ----


def test_choosing_and_judging_texts_are_apart_and_complete():
    """Nine texts: five choose, four judge; with a limit of two, two of the five steer."""
    texts = examples(9)
    panel = Panel.of(texts, texts[:6], steering=2)
    assert panel.choosing[OWN] == texts[::2] and panel.judging[OWN] == texts[1::2]
    assert panel.steering[OWN] == [texts[0], texts[2]]
    assert panel.choosing[OTHER] == [texts[0], texts[2], texts[4]]
    assert panel.fingerprint() != Panel.of(texts).fingerprint()
    with pytest.raises(DataError, match="too few"):
        Panel.of(texts[:5])


def test_reading_costs_what_each_text_costs_alone():
    """Batched and padded, against log-softmax of one text at a time, in the texts' order."""
    model, texts = tiny_model("olmoe").train(), examples(5)
    cost, trace = read(model, texts, settings(batch_size=2))
    assert trace is None and model.training
    for text, nll, tokens in zip(texts, cost.nll, cost.tokens, strict=True):
        ids = torch.tensor(text.input_ids)
        with torch.no_grad():
            log_p = model.eval()(ids[None]).logits[0].log_softmax(-1)
        wanted = [
            -log_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if text.completion_mask[t]
        ]
        assert nll == pytest.approx(sum(wanted), rel=1e-5) and tokens == len(wanted)


def test_a_read_text_is_traced_as_a_generation():
    """Prompt rows in one pass, then a pass per completion token; ids are those that ran."""
    model, texts = tiny_model("olmoe"), examples(3)
    routers = find_routers(model)
    _, trace = read(model, texts, settings(batch_size=2), routers)
    at = 0
    for number, text in enumerate(texts):
        rows = slice(at, at + len(text))
        assert (trace.sequence[rows] == number).all()
        assert trace.kind[rows].tolist() == [int(one) for one in text.completion_mask]
        passes = trace.forward[rows] - trace.forward[at]
        assert passes.tolist() == [0, 0, 0, *range(1, len(text) - 2)]
        with RoutingRecorder(routers) as recorder, torch.no_grad():
            model(torch.tensor(text.input_ids)[None])
        for layer, one in enumerate(recorder.take()):
            assert trace.experts[rows, layer].tolist() == one.top_k_index.tolist()
        at += len(text)
    assert at == len(trace)


def test_loads_of_a_read_text_equal_a_list_of_those_used_last():
    """LRU with four slots, cold before each text, counted by hand for completion tokens."""
    model, texts = tiny_model("olmoe"), examples(3)
    _, trace = read(model, texts, settings(), find_routers(model))
    loads = Loads.of(trace, 4)
    for number in range(len(texts)):
        rows, count = np.flatnonzero(trace.sequence == number), 0
        for layer in range(trace.num_layers):
            prompt = sorted({e for row in rows[:3] for e in trace.experts[row, layer].tolist()})
            held = prompt[-4:]
            if len(prompt) > 4:
                break
            for row in rows[3:]:
                wanted = trace.experts[row, layer].tolist()
                count += sum(e not in held for e in wanted)
                held = ([e for e in held if e not in wanted] + sorted(wanted))[-4:]
        else:
            assert loads.loads["lru"][number] == count
    assert loads.tokens.tolist() == [sum(text.completion_mask) for text in texts]


# ---- a run within a price ----


CHOSEN = settings(steps=12, lambda_cache=4.0, anchor="none")


@pytest.fixture(scope="module")
def reference_run():
    """Texts, what the NLL-only run left, and its model; the texts are those it trained on.

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
    assert tried[0]["strength"] == 0.5 > tried[2]["strength"] > tried[1]["strength"]
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
