"""A prior at work: what is served changes the next prefetch, and nothing else does."""

import logging

import numpy as np
import pytest
from small_olmoe import EXPERTS, LAYERS, PROMPT_TEXT, TOP_K, always, tiny_model, words_tokenizer

from melinoe.cache.trace import COMPLETION_ROW
from melinoe.errors import AttachError, ModelError
from melinoe.generate import generate
from melinoe.moe.routing import fingerprint
from melinoe.predictor import AdaptivePredictor, Prior, PriorSettings, use_counts
from melinoe.runtime.attach import attach


def new_prior(model, **settings):
    return Prior(LAYERS, EXPERTS, fingerprint(model), PriorSettings(**settings))


def spikes(*experts):
    """Uses of one expert in each layer."""
    counts = np.zeros((LAYERS, EXPERTS))
    counts[range(LAYERS), experts] = 9
    return counts


def unsure(model, experts):
    """A predictor that ranks *experts* first, each by a factor of 1.1 before the next."""
    base = always(model, experts)
    base.network.output.bias.data *= 0.1
    return base


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
    learner = AdaptivePredictor(new_prior(model))
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
    """A prior alone: the first request prefetches nothing, the second what the first used most."""
    model, tokenizer = tiny_model(), words_tokenizer()
    prior = new_prior(model)
    learner = AdaptivePredictor(prior, key="ada")
    with attach(model, slots=3) as handle:
        first = generate(model, handle, tokenizer, PROMPT_TEXT, 8, learner)
        assert first.counters.prefetch_loads.sum() == 0
        assert prior.keys() == ["ada"] and prior.requests("ada") == 1
        handle.reset_cache()
        seen = []
        hook = model.register_forward_pre_hook(lambda *_: seen.append(handle.resident()))
        second = generate(model, handle, tokenizer, PROMPT_TEXT, 8, learner, "prompt")
        hook.remove()
        plain = generate(model, handle, tokenizer, PROMPT_TEXT, 8)
    named = prior.top("ada", 3)
    assert seen[0] == [sorted(layer) for layer in named]
    assert second.counters.prefetch_loads.tolist() == [len(layer) for layer in named]
    assert first.ids == second.ids == plain.ids  # a prefetch changes no word


def test_switched_off_or_not_learning_nothing_changes():
    """The predictor's own experts, and a prior that stays as it was."""
    model, tokenizer = tiny_model(), words_tokenizer()
    prior, base = new_prior(model), unsure(model, [6, 1, 4])
    prior.observe("", spikes(0, 2), base.predict([3]))
    frozen = AdaptivePredictor(prior, base, learns=False)
    assert frozen.top([3], 3) != base.top([3], 3)
    with attach(model, slots=3) as handle:
        generate(model, handle, tokenizer, PROMPT_TEXT, 4, frozen)
        assert prior.requests("") == 1
        prior.enabled = False
        off = AdaptivePredictor(prior, base)
        generate(model, handle, tokenizer, PROMPT_TEXT, 4, off)
        assert off.top([3], 3) == base.top([3], 3)
        assert AdaptivePredictor(prior).top([3], 3) == [[]] * LAYERS
    prior.enabled = True
    assert prior.requests("") == 1


def test_traffic_overrules_the_predictor_and_a_reset_gives_it_back():
    """Twenty requests of experts 0 and 2 put them first; after the reset 6 leads again."""
    model = tiny_model()
    prior, base = new_prior(model), unsure(model, [6, 1, 4])
    both = AdaptivePredictor(prior, base, key="ada")
    assert [layer[0] for layer in base.top([3], 3)] == [6, 6]
    assert both.top([3], 3) == base.top([3], 3)
    for _ in range(20):
        both.top([3], 3)
        both.observe(spikes(0, 2))
    assert [layer[0] for layer in both.top([3], 3)] == [0, 2]
    assert AdaptivePredictor(prior, base, key="bob").top([3], 3) == base.top([3], 3)
    prior.reset("ada")
    assert both.top([3], 3) == base.top([3], 3)
    assert len(both.top([3])[0]) == base.slots


def test_another_models_prior_is_refused_before_anything_is_loaded():
    """Equal shapes, other routers; alone and with a predictor."""
    model, other = tiny_model(), tiny_model(seed=1)
    with pytest.raises(ModelError, match="start another one"):
        AdaptivePredictor(new_prior(other), always(model, [1]))
    with attach(model, slots=3) as handle:
        learner = AdaptivePredictor(new_prior(model))
        learner.bind(model)
        with pytest.raises(ModelError, match="start another one"):
            learner.bind(other)
        with pytest.raises(ModelError, match="start another one"):
            generate(
                model, handle, words_tokenizer(), PROMPT_TEXT, 2,
                AdaptivePredictor(new_prior(other)),
            )  # fmt: skip
        assert handle.counters.prefetch_loads.sum() == 0


def test_a_prior_alone_must_be_told_the_slots():
    """It has no number of its own."""
    with pytest.raises(ValueError, match="slots"):
        AdaptivePredictor(new_prior(tiny_model())).top([3])


def test_a_single_new_token_teaches_nothing():
    """Nothing was decoded, so no key is made."""
    model = tiny_model()
    prior = new_prior(model)
    with attach(model, slots=3) as handle:
        generate(model, handle, words_tokenizer(), PROMPT_TEXT, 1, AdaptivePredictor(prior))
    assert prior.keys() == []


def test_learning_is_quiet_on_the_reference_engine(caplog):
    """It costs no speed there, so nothing is logged."""
    model = tiny_model()
    with caplog.at_level(logging.WARNING), attach(model, slots=3) as handle:
        learner = AdaptivePredictor(new_prior(model))
        generate(model, handle, words_tokenizer(), PROMPT_TEXT, 3, learner)
    assert not caplog.records
