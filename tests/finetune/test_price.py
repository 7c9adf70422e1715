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

import melinoe.finetune.price as price_module
from melinoe.data import Example
from melinoe.errors import DataError, OutputExistsError, TrainingError
from melinoe.finetune import train
from melinoe.finetune.panel import OTHER, OWN, Panel
from melinoe.finetune.price import describe, finetune_within
from melinoe.finetune.reading import Cost, Loads, read
from melinoe.finetune.reference import Reference, ReferenceCallback
from melinoe.finetune.steering import Price, PriceCallback, largest_share
from melinoe.finetune.strength import StrengthController, parse_increase
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


def test_the_largest_share_is_found_by_halving():
    """Anything up to .3 is within: six halvings come within 1/64 below it."""
    asked = []
    found = largest_share(lambda share: asked.append(share) or share <= 0.3, 6)
    assert 0.3 - 1 / 64 <= found <= 0.3 and len(asked) == 7
    assert largest_share(lambda share: True, 6) == 1.0
    assert largest_share(lambda share: share == 0, 6) == 0.0


# ---- texts ----


def test_steering_and_judging_texts_are_apart_and_complete():
    """Nine texts: three steer, six judge; with a limit of two, two steer."""
    texts = examples(9)
    panel = Panel.of(texts, texts[:6])
    assert panel.steering[OWN] == [texts[0], texts[3], texts[6]]
    assert panel.judging[OWN] == [texts[i] for i in (1, 2, 4, 5, 7, 8)]
    assert panel.steering[OTHER] == [texts[0], texts[3]]
    assert len(Panel.of(texts, steering=2).judging[OWN]) == 7
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
    panel, model = Panel.of(examples(12), examples(12, seed=6)), tiny_model("olmoe")
    watch = ReferenceCallback(panel, 2)
    train(model, examples(12), CHOSEN.control(), pad_token_id=0, callbacks=[watch])
    return panel, watch.reference({}), model


def run_within(reference_run, price):
    """The callback of a run within *price*, and its model."""
    panel, reference, _ = reference_run
    model = tiny_model("olmoe")
    callback = PriceCallback(panel, price, reference, CHOSEN.lambda_cache)
    train(model, examples(12), CHOSEN, pad_token_id=0, callbacks=[callback])
    return callback, model


def test_the_weight_follows_the_gap_and_what_is_written_is_within_the_price(reference_run):
    """Too strong a start: the weight falls; the final model is judged on the other texts."""
    panel, reference, theirs = reference_run
    callback, ours = run_within(reference_run, Price(0.001))
    steps = [row["step"] for row in callback.history]
    assert steps == [2, 4, 6, 8, 10, 12] == list(reference.curve)
    assert callback.history[0]["strength"] == 4.0 and callback.controller.strength < 4.0
    assert callback.trainer.locality.lambda_cache == callback.controller.strength
    outcome = callback.metadata()["price"]
    for name in (OWN, OTHER):
        costs = [read(one, panel.judging[name], settings())[0] for one in (ours, theirs)]
        increase = math.exp(costs[0].mean - costs[1].mean) - 1
        assert outcome["paid"][name]["mean"] == pytest.approx(increase, rel=1e-3, abs=1e-6)
    steering = [read(one, panel.steering[OWN], settings())[0] for one in (ours, theirs)]
    assert steering[0].mean - steering[1].mean <= math.log1p(0.001)
    assert 0 <= callback.kept < 1 and outcome["kept"] == callback.kept
    assert outcome["met"] is (outcome["paid"][OWN]["mean"] <= 0.001)
    assert "transfers per token became" in describe(outcome)


def test_a_generous_price_leaves_the_weights_as_they_were_trained(reference_run):
    """Nothing is taken back, and the weight of the cache term rises."""
    callback, _ = run_within(reference_run, Price(5.0))
    assert callback.kept == 1.0 and callback.controller.strength > 4.0
    assert callback.outcome["met"] and callback.outcome["met_by_the_whole_interval"]


def test_where_nothing_is_within_the_price_the_reference_is_left(reference_run, monkeypatch):
    """Every mixture is above: the weights are the reference's bit for bit, and it is said."""
    monkeypatch.setattr(PriceCallback, "_is_within", lambda self, a, b, share: share == 0)
    callback, ours = run_within(reference_run, Price(0.01))
    other = ours.state_dict()
    for name, tensor in reference_run[-1].state_dict().items():
        assert torch.equal(tensor, other[name])
    assert callback.kept == 0.0 and "this is the reference" in describe(callback.outcome)


def test_a_bound_on_other_domains_is_kept_too(reference_run):
    """Its gap is in the history and decides what is kept."""
    panel, _, theirs = reference_run
    callback, ours = run_within(reference_run, Price(5.0, 0.001))
    assert all("gap_other" in row for row in callback.history)
    costs = [read(one, panel.steering[OTHER], settings())[0] for one in (ours, theirs)]
    assert costs[0].mean - costs[1].mean <= math.log1p(0.001)
    assert set(callback.outcome["bounds"]) == {OWN, OTHER}


def test_a_price_above_its_bound_is_said_plainly():
    """The judging texts cost more than was allowed: "ABOVE", and not met."""
    callback = PriceCallback.__new__(PriceCallback)
    cost = Cost(np.array([10.0, 12.0, 9.0]), np.array([5.0, 6.0, 4.0]))
    worse = Cost(cost.nll * 1.05, cost.tokens)
    loads = Loads({"lru": np.ones(3), "lfu": np.ones(3)}, cost.tokens)
    callback.reference = Reference({}, 1, {}, {OWN: cost}, {}, loads, loads)
    callback.price, callback.kept, callback.history = Price(0.01), 1.0, []
    callback.controller = StrengthController(0.5, {OWN: 0.01})
    outcome = callback._outcome({OWN: worse}, loads)
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
    """The second call trains once; same price, same numbers; the record has what was paid."""
    calls = []
    real = price_module.finetune
    monkeypatch.setattr(
        price_module, "finetune", lambda *a, **k: calls.append(a[2].name) or real(*a, **k)
    )
    first = within(checkpoint)
    assert calls == ["out.reference", "out"]
    again = within(checkpoint, "again", reference=checkpoint / "out.reference")
    assert calls == ["out.reference", "out", "again"]
    record = json.loads((checkpoint / "out" / "melinoe.json").read_text())
    assert record["price"] == json.loads(json.dumps(first.metadata["price"]))
    assert again.metadata["price"]["paid"] == first.metadata["price"]["paid"]
    control = json.loads((checkpoint / "out.reference" / "melinoe.json").read_text())
    assert control["settings"]["lambda_cache"] == 0


def test_a_reference_of_another_run_is_refused(checkpoint):
    """Other data, another setting, a damaged file, none at all: each says what and the way out."""
    within(checkpoint)
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
    (reference / "price_reference.safetensors").write_bytes(b"torn")
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
    again = PriceCallback(panel, Price(0.01), reference, 4.0)
    again.trainer = callback.trainer
    again.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    assert again.history == callback.history
    assert again.controller.strength == callback.controller.strength
    watch = ReferenceCallback(panel, 2)
    watch.curve, watch.loads = dict(reference.curve), {"base": reference.base}
    other = ReferenceCallback(panel)
    other.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert other.every == 2 and other.curve.keys() == watch.curve.keys()
    assert np.array_equal(other.curve[4][OWN].nll, watch.curve[4][OWN].nll)
    assert np.array_equal(other.loads["base"].loads["lfu"], reference.base.loads["lfu"])
