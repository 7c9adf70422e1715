"""What each strategy names, worked by hand; no model."""

import numpy as np
import pytest

from melinoe.cache.prefetch import Popularity, Prefill, Prompt
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import TraceBuilder
from melinoe.errors import MelinoeError


def test_prefill_names_what_the_prompt_used_most():
    """Uses 2, 0, 5, 2 and two slots: 2 first, then of 0 and 3 the lower id; 1 never."""
    uses = np.array([[2, 0, 5, 2], [0, 0, 0, 1]])
    named = Prefill().before_completion(Prompt((2, 2), 4, uses=uses))
    assert named == [[2, 0], [3]]


def test_prefill_counts_a_prompt_s_own_tokens_alone():
    """Padding chose 7, the prompt 1 (twice) and 4; both come back once the prompt is over."""
    builder = TraceBuilder(1, 8, 1)
    builder.add_forward(np.array([[[7]], [[1]], [[4]], [[1]]]), 0, np.array([2, 0, 0, 0]))
    builder.add_forward(np.array([[[1]]]), 0, 1)
    asked = []

    class Listening(Prefill):
        def before_completion(self, prompt):
            asked.append(prompt.uses.tolist())
            return super().before_completion(prompt)

    simulate(builder.trace(), 2, prefetch=Listening())
    assert asked == [[[0, 2, 0, 0, 1, 0, 0, 0]]]


def test_popularity_of_another_model_is_refused():
    """Two layers of three experts do not fit a trace of one layer of eight."""
    builder = TraceBuilder(1, 8, 1)
    builder.add_forward(np.array([[[1]]]), 0, 1)
    with pytest.raises(MelinoeError, match="2 layers of 3 experts"):
        simulate(builder.trace(), 2, prefetch=Popularity(np.ones((2, 3))))
