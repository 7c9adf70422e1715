"""What no predictor can be fitted to is refused in one sentence."""

import numpy as np
import pytest
from planted_traces import EXPERTS, LAYERS, QUICK, embeddings, planted

from melinoe.errors import (
    DataError,
    TokenizerError,
    TraceError,
)
from melinoe.predictor import (
    fit,
)
from melinoe.predictor.fit import fit_shares


def test_prompts_that_are_not_the_traces_are_refused():
    """One prompt too few, and one of another length, each show that they belong elsewhere."""
    trace, prompts = planted(20)
    with pytest.raises(TraceError, match="20 sequences but 19"):
        fit(trace, prompts[:-1], embeddings(), slots=4)
    with pytest.raises(TraceError, match="sequence 3"):
        fit(trace, [*prompts[:3], prompts[3][:-1], *prompts[4:]], embeddings(), slots=4)


def test_too_few_prompts_are_refused():
    """Nine prompts teach nothing that could be checked."""
    trace, prompts = planted(9)
    with pytest.raises(DataError, match="at least 10"):
        fit(trace, prompts, embeddings(), slots=4)


def test_a_sequence_without_completion_teaches_nothing():
    """Shares of a sequence that ended at once are all zero, and it is left out of the fit."""
    target = np.full((11, LAYERS, EXPERTS), 1 / EXPERTS)
    target[5] = 0
    prompts = [[2, 3]] * 11
    predictor = fit_shares(target, prompts, embeddings(), 4, "m", settings=QUICK)
    assert predictor.popularity == pytest.approx(np.full((LAYERS, EXPERTS), 1 / EXPERTS))


def test_ids_beyond_the_vocabulary_name_the_tokenizer():
    """Token 32 of a vocabulary of 32 comes from another tokenizer."""
    trace, prompts = planted(20)
    predictor = fit(trace, prompts, embeddings(), slots=4, settings=QUICK)
    with pytest.raises(TokenizerError, match="token id 32"):
        predictor.predict([3, 32])


@pytest.mark.parametrize("slots", [0, EXPERTS + 1])
def test_slots_outside_the_layer_are_the_callers_mistake(slots):
    """A cache holds between one expert and all of them."""
    trace, prompts = planted(20)
    with pytest.raises(ValueError, match="slots"):
        fit(trace, prompts, embeddings(), slots=slots)
