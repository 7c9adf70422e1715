"""The price over the control: worked out apart from evaluate's own numbers."""

import json
import math
import shutil

import numpy as np
import pytest
from small_olmoe import EXPERTS, tiny_model, words_tokenizer
from three_models import SEEDS, SETTINGS, loads_of_two_slots, texts

from melinoe import attach
from melinoe.checkpoint import read_metadata, write_metadata
from melinoe.data import encode
from melinoe.evaluate import perplexity
from melinoe.measure import reading_trace
from melinoe.outcome import record_outcome


@pytest.fixture(scope="module")
def read():
    """Of each model, read here: losses, completion tokens, loads and experts, text by text."""
    encoded, found = encode(texts(), words_tokenizer(), 32), {}
    for name, seed in SEEDS.items():
        model = tiny_model(seed)
        cost = perplexity(model, encoded, 4)
        handle = attach(model, slots=EXPERTS)
        trace = reading_trace(model, handle, encoded[:5])
        handle.detach()
        found[name] = cost.nll, cost.tokens, *loads_of_two_slots(trace), trace
    return found


def test_the_price_is_the_perplexity_over_the_controls(beside_control, read):
    """exp of the difference of mean losses, minus 1; not the change from the base."""
    outcome = read_metadata(beside_control)["outcome"]
    nll, tokens = read["tuned"][:2]
    for name, key in (("control", "change_from_control"), ("base", "change")):
        theirs = read[name][0]
        by_hand = math.exp(sum(nll) / sum(tokens) - sum(theirs) / sum(tokens)) - 1
        assert outcome[key]["perplexity"]["words"]["mean"] == pytest.approx(by_hand, rel=1e-6)
    mean = math.exp(sum(read["control"][0]) / sum(tokens))
    assert outcome["control"]["perplexity"]["words"]["perplexity"]["mean"] == pytest.approx(mean)
    assert outcome["change"]["perplexity"] != outcome["change_from_control"]["perplexity"]


def test_its_interval_is_that_of_texts_drawn_for_both_models_at_once(beside_control, read):
    """A bootstrap of our own, other draws: the ends agree to what 20,000 draws leave open."""
    nll, tokens = read["tuned"][:2]
    theirs, draws = read["control"][0], np.random.default_rng(9).integers(0, 8, (20_000, 8))
    gaps = (nll - theirs)[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.expm1(np.quantile(gaps, [0.025, 0.975]))
    found = read_metadata(beside_control)["outcome"]["change_from_control"]["perplexity"]["words"]
    width = high - low
    assert found["low"] == pytest.approx(low, abs=0.05 * width)
    assert found["high"] == pytest.approx(high, abs=0.05 * width)


def test_the_saving_is_the_controls_loads_over_ours(beside_control, read):
    """Counted token by token: loads of two slots, text by text, and the ratio of their rates."""
    change = read_metadata(beside_control)["outcome"]["change_from_control"]["reading"]
    cache = change["transfers_per_token"]["lru"]
    ratio = cache["ratio"][cache["slots"].index(2)]
    (ours, tokens), (theirs, same) = (read[name][2:4] for name in ("tuned", "control"))
    assert tokens == same
    assert ratio["mean"] == pytest.approx(sum(theirs) / sum(ours)) and ratio["n"] == 5


def test_the_change_in_experts_is_a_difference_of_counted_sets(beside_control, read):
    """Distinct experts of each completion, mean over layers; tuned minus control, mean of texts."""
    change = read_metadata(beside_control)["outcome"]["change_from_control"]["reading"]

    def distinct(trace, sequence):
        rows = np.flatnonzero(trace.sequence == sequence)
        rows = rows[trace.kind[rows] == trace.kind[rows[-1]]]
        return np.mean([len(set(layer.ravel())) for layer in trace.experts[rows].swapaxes(0, 1)])

    gaps = [distinct(read["tuned"][4], one) - distinct(read["control"][4], one) for one in range(5)]
    assert change["experts_per_sequence"]["mean"] == pytest.approx(np.mean(gaps))


def test_before_and_after_are_what_they_are_without_a_control(beside_control, tuned, checkpoints):
    """To the last digit; the control only adds."""
    alone, beside = (read_metadata(path)["outcome"] for path in (tuned, beside_control))
    for key in ("before", "after", "change", "prompts", "slots", "examples"):
        assert alone[key] == beside[key]
    assert "control" not in alone and "change_from_control" not in alone
    own = read_metadata(checkpoints / "control")["fingerprint"]
    assert beside["control_run"].items() >= {"name": "control", "fingerprint": own}.items()
    assert str(beside_control.parent) not in json.dumps(beside)


def test_the_model_itself_as_its_control_cost_nothing(checkpoints, tmp_path):
    """Zero to the bit, and every ratio 1."""
    for name in ("tuned", "twin"):
        shutil.copytree(checkpoints / "tuned", tmp_path / name)
    settings = read_metadata(checkpoints / "control")["settings"]
    write_metadata(tmp_path / "twin", {"settings": settings})
    held_out = {"words": texts()}
    found = record_outcome(
        tmp_path / "tuned", checkpoints / "base", held_out, settings=SETTINGS,
        control=tmp_path / "twin",
    )  # fmt: skip
    change = found["outcome"]["change_from_control"]
    assert change["perplexity"]["words"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 8}
    ratios = [r for one in change["reading"]["transfers_per_token"].values() for r in one["ratio"]]
    assert ratios and all(r["low"] == r["mean"] == r["high"] == 1 for r in ratios)


def test_measuring_again_without_a_control_takes_the_old_one_away(
    checkpoints, beside_control, tmp_path
):
    """An outcome is of one measurement: nothing of an earlier one stays in it."""
    path = tmp_path / "tuned"
    shutil.copytree(beside_control, path)
    record_outcome(path, checkpoints / "base", {"words": texts()}, settings=SETTINGS)
    assert "change_from_control" not in read_metadata(path)["outcome"]
