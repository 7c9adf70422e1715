"""What the predictor learns of a prompt, judged on prompts that it has not seen."""

import time

import numpy as np
import pytest
import torch
from planted_traces import (
    EXPERTS,
    LAYERS,
    QUICK,
    embeddings,
    planted,
)

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.predictor import (
    compare,
    fit,
    recall_at,
    use_counts,
)


def test_uses_are_counted_by_sequence_layer_and_kind():
    """Two completion rows of one layer choose (0, 1) and (1, none): expert 1 twice, 0 once."""
    trace = Trace(
        experts=np.asarray([[[2, 2]], [[0, 1]], [[1, -1]]], np.int16),
        forward=np.asarray([0, 1, 2], np.int32),
        sequence=np.zeros(3, np.int32),
        kind=np.asarray([PROMPT_ROW, COMPLETION_ROW, COMPLETION_ROW], np.uint8),
        num_experts=3,
    )
    assert use_counts(trace, COMPLETION_ROW).tolist() == [[[1, 2, 0]]]
    assert use_counts(trace, PROMPT_ROW).tolist() == [[[0, 0, 2]]]


def test_recall_is_the_share_of_uses_that_the_guess_would_have_served():
    """Layer 0 guesses experts 2, 0 of shares .5 .3 .2; layer 1 guesses 1, 2 of .1 .1 .8."""
    target = np.asarray([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    scores = np.asarray([[2.0, 1.0, 3.0], [0.0, 2.0, 1.0]])
    assert recall_at(target, scores, 2) == pytest.approx([(0.7 + 0.9) / 2])


def test_a_planted_mapping_is_learned_and_popularity_is_not_enough():
    """Four topics of four experts, four slots: who knows the topic serves all, else a quarter."""
    trace, prompts = planted()
    comparison = compare(trace, prompts, embeddings(), slots=4, settings=QUICK)
    assert comparison.recall["learned"].mean > 0.97
    assert comparison.recall["popularity"].mean < 0.45
    assert comparison.recall["empty"].mean == 0
    assert comparison.ceiling.mean == pytest.approx(1)
    assert comparison.winner == "learned"


def test_two_hundred_sequences_are_fitted_in_seconds():
    """The stage is no reason to skip it: under ten seconds of the processor, with its defaults."""
    trace, prompts = planted(200)
    start = time.process_time()
    fit(trace, prompts, embeddings(), slots=4)
    assert time.process_time() - start < 10


def test_predictions_are_distributions_and_top_lists_the_likeliest_first():
    """Each layer sums to 1; the planted topic's four experts come out as the top four."""
    trace, prompts = planted()
    predictor = fit(trace, prompts, embeddings(), slots=4, settings=QUICK)
    found = predictor.predict(prompts[1])
    assert found.shape == (LAYERS, EXPERTS) and found.dtype == np.float32
    assert found.sum(-1) == pytest.approx([1, 1], abs=1e-5)
    for layer, ids in enumerate(predictor.top(prompts[1])):
        assert set(ids) == {4, 5, 6, 7}
        assert sorted(ids, key=lambda e: -found[layer, e]) == ids
    assert [len(ids) for ids in predictor.top(prompts[1], 3)] == [3, 3]


def test_an_empty_prompt_gets_the_popularity():
    """Nothing to read, so the mean over the fitted prompts, which sums to 1."""
    trace, prompts = planted()
    predictor = fit(trace, prompts, embeddings(), slots=4, settings=QUICK)
    assert np.array_equal(predictor.predict([]), predictor.popularity)
    assert predictor.predict([]).sum(-1) == pytest.approx([1, 1], abs=1e-5)


def test_equal_seeds_give_equal_predictors_and_leave_the_global_seed_alone():
    """Fitting twice gives bit-equal predictions, and torch's own generator does not move."""
    trace, prompts = planted(20)
    state = torch.random.get_rng_state()
    first = fit(trace, prompts, embeddings(), slots=4, seed=3, settings=QUICK)
    second = fit(trace, prompts, embeddings(), slots=4, seed=3, settings=QUICK)
    other = fit(trace, prompts, embeddings(), slots=4, seed=4, settings=QUICK)
    assert np.array_equal(first.predict(prompts[0]), second.predict(prompts[0]))
    assert not np.array_equal(first.predict(prompts[0]), other.predict(prompts[0]))
    assert torch.equal(state, torch.random.get_rng_state())
