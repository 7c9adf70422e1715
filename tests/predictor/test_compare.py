"""The learned predictor against rivals that cost nothing: recall, and transfers saved."""

import numpy as np
import pytest
from planted_traces import EXPERTS, LAYERS, QUICK, TOP_K, VOCABULARY, embeddings, planted
from trace_builder import TraceBuilder

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW
from melinoe.predictor import (
    Comparison,
    compare,
)
from melinoe.stats import bootstrap, paired_difference


def test_loading_the_right_experts_ahead_saves_what_it_costs_and_no_more():
    """
    Four topics of four experts, four slots, six random prompt tokens before.

    The planted experts are all used by nearly every completion: named ahead they are loaded once,
    as they would have been on demand, so the loads of a perfect guess are those of no guess, and
    whatever a guess names wrongly is paid on top.
    """
    trace, prompts = planted()
    found = compare(trace, prompts, embeddings(), slots=4, settings=QUICK)
    empty, right = found.transfers["empty"].mean, found.transfers["learned"].mean
    assert right == pytest.approx(empty, abs=0.05)
    assert found.transfers["popularity"].mean > empty + 0.3
    assert found.saved["popularity"].high < 0
    assert found.winner == "learned"
    record = found.to_record("tiny")
    assert record["prefetch"] == found.prefetch and set(record["saved"]) == {
        "popularity",
        "prefill",
        "learned",
    }


def test_a_prefetch_that_saves_is_recommended():
    """Twenty loads of an empty start against ten, whole interval above 0; against thirty, not."""
    recall = {name: bootstrap([0.5, 0.5]) for name in ("empty", "popularity", "prefill")}
    recall["learned"] = bootstrap([0.9, 0.9])
    for ours, wanted in ((10.0, "learned"), (20.0, "none"), (30.0, "none")):
        saved = {"learned": paired_difference([20.0, 20.0], [ours, ours])}
        one = Comparison(4, recall, bootstrap([1.0, 1.0]), bootstrap([0.4, 0.4]), {}, saved)
        assert one.winner == "learned" and one.prefetch == wanted


def test_transfers_are_those_of_the_simulator():
    """Popularity of the other folds, written out: loads and prefetch loads over tokens."""
    trace, prompts = planted(20)
    found = compare(trace, prompts, embeddings(), slots=4, settings=QUICK, folds=2)
    plain = simulate(trace, 4, "lfu", reset_between_sequences=True).counters
    assert found.transfers["empty"].mean == pytest.approx(plain.transfers_per_token())
    assert found.transfers["popularity"].mean > plain.transfers_per_token()


def test_the_prefills_experts_win_where_they_tell_and_tokens_do_not():
    """Prompts of random tokens whose own rows show the experts to come: a free rival is chosen."""
    rng = np.random.default_rng(0)
    builder, prompts = TraceBuilder(LAYERS, EXPERTS, TOP_K), []
    for sequence in range(40):
        favourites = rng.permutation(EXPERTS)[:4]
        prompts.append(rng.integers(2, VOCABULARY, 5).tolist())
        for rows, kind in ((5, PROMPT_ROW), (10, COMPLETION_ROW)):
            chosen = rng.choice(favourites, (rows, LAYERS, TOP_K))
            builder.add_forward(chosen, sequence, kind)
    comparison = compare(builder.trace(), prompts, embeddings(), slots=4, settings=QUICK)
    assert comparison.recall["prefill"].mean > 0.9
    assert comparison.recall["learned"].mean < 0.5
    assert comparison.winner == "prefill"


def test_where_prompts_say_nothing_the_learned_predictor_does_not_win():
    """Completions of the same distribution whatever the prompt: no gain, so a rival is chosen."""
    rng = np.random.default_rng(1)
    builder, prompts = TraceBuilder(LAYERS, EXPERTS, TOP_K), []
    likely = np.asarray([0.2] * 4 + [0.2 / 12] * 12)
    for sequence in range(40):
        prompts.append(rng.integers(2, VOCABULARY, 5).tolist())
        for rows, kind in ((5, PROMPT_ROW), (10, COMPLETION_ROW)):
            chosen = rng.choice(EXPERTS, (rows, LAYERS, TOP_K), p=likely)
            builder.add_forward(chosen, sequence, kind)
    comparison = compare(builder.trace(), prompts, embeddings(), slots=4, settings=QUICK)
    assert comparison.winner != "learned"
    assert comparison.recall["learned"].mean == pytest.approx(
        comparison.recall["popularity"].mean, abs=0.03
    )
