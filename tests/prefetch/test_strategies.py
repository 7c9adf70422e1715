"""What each strategy names, worked by hand; no model."""

import numpy as np
import pytest

from melinoe.cache.prefetcher import Prompt
from melinoe.cache.simulator import simulate
from melinoe.cache.trace_builder import TraceBuilder
from melinoe.errors import MelinoeError
from melinoe.prefetch.counted import Popularity, Prefill
from melinoe.prefetch.nearest import Nearest


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


def test_the_nearest_prompt_s_experts_are_named():
    """Three prompts on axes; the asked one lies by the second, whose completion used 3 most."""
    from melinoe.prefetch.store import PromptStore

    uses = np.zeros((3, 1, 4), np.uint32)
    uses[0, 0] = [9, 0, 0, 0]
    uses[1, 0] = [0, 2, 0, 5]
    uses[2, 0] = [0, 0, 9, 0]
    store = PromptStore(np.eye(3, dtype=np.float32), uses, "f")
    nearest = Nearest(store, neighbours=1)
    nearest._embed = lambda ids: np.array([0.1, 0.9, 0.0], np.float32)
    assert nearest.neighbours([1]) == [1]
    assert nearest.named(Prompt((3,), 4, ids=(1,))) == [[3, 1]]
    both = Nearest(store, neighbours=2)
    both._embed = nearest._embed
    assert both.neighbours([1]) == [1, 0]
    assert both.named(Prompt((3,), 4, ids=(1,))) == [[0, 3, 1]]  # shares 1, 5/7, 2/7
