"""Before and after fine-tuning: paired numbers against independent counts."""

import hashlib
import json
import shutil

import pytest
from small_olmoe import EXPERTS, LAYERS, TOP_K, tiny_model, words_tokenizer
from three_models import SETTINGS, loads_of_two_slots, texts

from melinoe import attach
from melinoe.checkpoint import read_metadata
from melinoe.data import Example, encode
from melinoe.evaluate import perplexity
from melinoe.measure import reading_trace
from melinoe.outcome import record_outcome
from melinoe.outcome.record import around, cache_sizes


def test_sizes_include_half_and_double_of_what_was_trained_for():
    """Of 64 experts, 16 slots: steps of four, and 8 and 32 among them; never none, never more."""
    assert around(16, 64) == [8, 16, 32]
    assert around(1, 8) == [1, 2] and around(6, 8) == [3, 6, 8]
    sizes = cache_sizes(17, 64)
    assert {8, 17, 34, 64} <= set(sizes) and sizes == sorted(set(sizes)) and sizes[0] == 4


def test_an_outcome_holds_what_independent_measurements_give(tuned, checkpoints):
    """Perplexity from `perplexity`, loads counted here, token by token."""
    outcome = read_metadata(tuned)["outcome"]
    assert (outcome["slots"], outcome["num_experts"]) == (2, EXPERTS)
    assert (outcome["layers"], outcome["top_k"], outcome["prompts"]) == (LAYERS, TOP_K, 5)
    encoded = encode(texts(), words_tokenizer(), 32)
    loads, tokens = {}, {}
    for side, seed in (("before", 0), ("after", 5)):
        model = tiny_model(seed)
        found = outcome[side]["perplexity"]["words"]
        assert found["in_domain"] and not outcome[side]["perplexity"]["far"]["in_domain"]
        assert found["perplexity"]["mean"] == pytest.approx(
            perplexity(model, encoded, 4).estimate.mean
        )
        handle = attach(model, slots=EXPERTS)
        trace = reading_trace(model, handle, encoded[:5])
        handle.detach()
        loads[side], tokens[side] = loads_of_two_slots(trace)
        cache = outcome[side]["reading"]["caches"]["lru"]
        at = cache["slots"].index(2)
        expected = sum(loads[side]) / sum(tokens[side])
        assert cache["transfers_per_token"][at]["mean"] == pytest.approx(expected)
    change = outcome["change"]["reading"]["transfers_per_token"]["lru"]
    ratio = change["ratio"][change["slots"].index(2)]
    assert ratio["mean"] == pytest.approx(sum(loads["before"]) / sum(loads["after"]))
    assert ratio["low"] <= ratio["mean"] <= ratio["high"] and ratio["n"] == 5


@pytest.fixture
def of_itself(checkpoints, tmp_path):
    """Measure the base against a copy of itself."""
    shutil.copytree(checkpoints / "base", tmp_path / "copy")

    def run(held_out):
        args = (tmp_path / "copy", checkpoints / "base", held_out)
        return record_outcome(*args, settings=SETTINGS)["outcome"]

    return run


def test_a_model_against_itself_has_not_changed(of_itself):
    """No difference, to the bit, in anything; every ratio 1."""
    change = of_itself({"words": texts()})["change"]
    assert change["perplexity"]["words"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 8}
    for name in ("writing", "reading"):
        assert change[name]["experts_per_sequence"]["mean"] == 0
        ratios = [r for one in change[name]["transfers_per_token"].values() for r in one["ratio"]]
        assert ratios and all(r["low"] == r["mean"] == r["high"] == 1 for r in ratios)


def test_plain_text_is_continued_from_its_half(of_itself):
    """Text without prompts still has something to write after, and to read."""
    plain = [Example("", f"w{i} w4 w5 w6 w7 w8", f"x:{i}") for i in range(3, 9)]
    outcome = of_itself({"plain": plain})
    assert len(outcome["after"]["writing"]["experts_per_sequence"]) == 5


def test_the_origin_is_recorded(tuned, checkpoints):
    """Base by name, its licence, and the data's hash; what fine-tuning wrote stays."""
    metadata = read_metadata(tuned)
    assert (metadata["base"], metadata["license"]) == ("base", "mit")
    digest = hashlib.sha256((checkpoints / "train.jsonl").read_bytes()).hexdigest()
    assert metadata["data"]["sha256"] == digest
    assert metadata["settings"]["capacity"] == 0.25 and len(metadata["log"]) == 4
    assert str(checkpoints) not in json.dumps(metadata)
