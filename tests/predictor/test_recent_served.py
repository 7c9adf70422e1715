"""Recent use at work: what is served changes the next prefetch, and nothing else does."""

import logging

import numpy as np
import pytest
from small_olmoe import EXPERTS, LAYERS, PROMPT_TEXT, TOP_K, tiny_model, words_tokenizer

from melinoe import attach
from melinoe.cache.trace import COMPLETION_ROW
from melinoe.errors import AttachError, ModelError
from melinoe.generate import generate
from melinoe.predictor import RecentUse, use_counts


def test_the_uses_that_are_counted_are_those_of_a_trace():
    """A prompt of four tokens and eight new ones: seven were decoded, two choices each."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle:
        with handle.record() as recorder:
            generate(model, handle, tokenizer, PROMPT_TEXT, 8)
        with handle.measure_uses() as meter:
            generate(model, handle, tokenizer, PROMPT_TEXT, 8)
    counted = meter.counts()
    assert counted.shape == (LAYERS, EXPERTS) and counted.sum() == 7 * TOP_K * LAYERS
    assert np.array_equal(counted, use_counts(recorder.trace(), COMPLETION_ROW)[0])


def test_two_cannot_watch_at_once():
    """While a trace is recorded uses are not counted, and the recording goes on."""
    model, tokenizer = tiny_model(), words_tokenizer()
    learner = RecentUse.of(model)
    with attach(model, slots=3) as handle:
        with handle.record() as recorder:
            with pytest.raises(AttachError, match="recording is running"):
                generate(model, handle, tokenizer, PROMPT_TEXT, 3, learner)
            generate(model, handle, tokenizer, PROMPT_TEXT, 3)
        assert recorder.trace().num_sequences == 1
        with handle.measure_uses(), pytest.raises(AttachError, match="recording is running"):
            handle.record().__enter__()
    with pytest.raises(AttachError, match="detached"), handle.measure_uses():
        pass


def test_what_was_served_is_what_is_prefetched_next():
    """The first request prefetches nothing, the second what the first used most."""
    model, tokenizer = tiny_model(), words_tokenizer()
    learner = RecentUse.of(model)
    assert learner.used.shape == (LAYERS, EXPERTS)
    with attach(model, slots=3) as handle:
        first = generate(model, handle, tokenizer, PROMPT_TEXT, 8, learner)
        assert first.counters.prefetch_loads.sum() == 0
        assert learner.completions == pytest.approx(1)
        named = learner.top([], 3)
        handle.reset_cache()
        seen = []
        hook = model.register_forward_pre_hook(lambda *_: seen.append(handle.resident()))
        second = generate(model, handle, tokenizer, PROMPT_TEXT, 8, learner, "prompt")
        hook.remove()
        plain = generate(model, handle, tokenizer, PROMPT_TEXT, 8)
    assert seen[0] == [sorted(layer) for layer in named]
    assert second.counters.prefetch_loads.tolist() == [len(layer) for layer in named]
    assert first.ids == second.ids == plain.ids  # a prefetch changes no word


def test_another_models_use_is_refused_before_anything_is_loaded():
    """Equal shapes, other routers."""
    model, other = tiny_model(), tiny_model(seed=1)
    with attach(model, slots=3) as handle:
        learner = RecentUse.of(model)
        learner.bind(model)
        with pytest.raises(ModelError, match="begin another one"):
            learner.bind(other)
        with pytest.raises(ModelError, match="begin another one"):
            generate(
                model, handle, words_tokenizer(), PROMPT_TEXT, 2,
                RecentUse.of(other),
            )  # fmt: skip
        assert handle.counters.prefetch_loads.sum() == 0


def test_a_single_new_token_teaches_nothing():
    """Nothing was decoded."""
    model = tiny_model()
    learner = RecentUse.of(model)
    with attach(model, slots=3) as handle:
        generate(model, handle, words_tokenizer(), PROMPT_TEXT, 1, learner)
    assert not learner.used.any()


def test_learning_is_quiet_on_the_reference_engine(caplog):
    """It costs no speed there, so nothing is logged."""
    model = tiny_model()
    with caplog.at_level(logging.WARNING), attach(model, slots=3) as handle:
        learner = RecentUse.of(model)
        generate(model, handle, words_tokenizer(), PROMPT_TEXT, 3, learner)
    assert not caplog.records
