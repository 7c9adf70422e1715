"""Reading a text is laid out as if it had been written: the same experts, pass by pass."""

import numpy as np
import pytest
import torch
from small_olmoe import EXPERTS, tiny_model

from melinoe import attach
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW
from melinoe.data import Encoded
from melinoe.errors import DataError
from melinoe.measure import reading_trace


def test_reading_gives_what_decoding_the_same_text_chooses():
    """Token by token with a key-value cache, on the same ids: equal experts in every row."""
    model = tiny_model()
    encoded = [
        Encoded([3, 4, 5, 6, 7], [False, False, True, True, True]),
        Encoded([8, 9], [False, True]),
    ]
    handle = attach(model, slots=EXPERTS)
    trace = reading_trace(model, handle, encoded)
    with handle.record() as recorder, torch.no_grad():
        for one in encoded:
            start = one.completion_mask.index(True)
            ids = torch.tensor([one.input_ids])
            past = model(input_ids=ids[:, :start], use_cache=True).past_key_values
            for at in range(start, len(one)):
                model(input_ids=ids[:, at : at + 1], past_key_values=past, use_cache=True)
    decoded = recorder.trace()
    handle.detach()
    assert np.array_equal(np.sort(trace.experts), np.sort(decoded.experts))
    assert trace.forward.tolist() == decoded.forward.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert trace.sequence.tolist() == [0, 0, 0, 0, 0, 1, 1]
    kinds = [PROMPT_ROW, PROMPT_ROW, *[COMPLETION_ROW] * 3, PROMPT_ROW, COMPLETION_ROW]
    assert trace.kind.tolist() == kinds


def test_a_prompt_after_a_completion_is_a_pass_of_its_own():
    """A chat's second question is computed at once, apart from what was written before it."""
    model = tiny_model()
    handle = attach(model, slots=EXPERTS)
    mask = [False, True, True, False, False, True]
    trace = reading_trace(model, handle, [Encoded([3, 4, 5, 6, 7, 8], mask)])
    assert trace.forward.tolist() == [0, 1, 2, 3, 3, 4]
    with pytest.raises(DataError):
        reading_trace(model, handle, [])
