"""Locality measures on traces small enough to count by eye."""

import numpy as np
from cache_traces import trace_of
from trace_builder import TraceBuilder

from melinoe.cache.locality import distinct_experts, experts_per_sequence, reuse


def two_sequences():
    """
    Two layers, top-2, six experts.

    Sequence 0: prompt (0,1), completion (1,2) (2,1) in layer 0; (0,1), (4,5) (0,4) in layer 1.
    Sequence 1: prompt (3,4), no completion but a padding row (5,5).
    """
    builder = TraceBuilder(2, 6, 2)
    builder.add_forward(np.array([[[0, 1], [0, 1]]]), 0, 0)
    builder.add_forward(np.array([[[1, 2], [4, 5]], [[3, 4], [3, 4]]]), [0, 1], [1, 0])
    builder.add_forward(np.array([[[2, 1], [0, 4]], [[5, 5], [5, 5]]]), [0, 1], [1, 2])
    return builder.trace()


def test_experts_per_sequence_is_the_mean_over_layers_of_distinct_completion_experts():
    """Layer 0 used {1,2}, layer 1 {0,4,5}: 2.5; no completion, no number."""
    result = experts_per_sequence(two_sequences())
    assert result[0] == 2.5
    assert np.isnan(result[1])


def test_reuse_compares_with_the_previous_token_of_the_sequence():
    """Layer 0: 1 of 2 (the prompt's last token), then 2 of 2; layer 1: 0, then 1: 4 of 8."""
    result = reuse(two_sequences())
    assert result[0] == 0.5
    assert np.isnan(result[1])


def test_absent_experts_are_never_reused():
    """(-1,0) then (-1,0): one choice, reused; not two."""
    trace = trace_of([[-1, 0]], [[-1, 0]], [[-1, -1]], num_experts=2, top_k=2)
    assert reuse(trace).tolist() == [1.0]
    assert experts_per_sequence(trace).tolist() == [1.0]


def test_distinct_experts_counts_the_whole_set():
    """Completion tokens alone: {1,2} in layer 0, {0,4,5} in layer 1."""
    assert distinct_experts(two_sequences()).tolist() == [2, 3]


def test_an_empty_trace_has_no_locality():
    """No rows: no sequences, no experts."""
    trace = TraceBuilder(2, 4, 1).trace()
    assert experts_per_sequence(trace).shape == reuse(trace).shape == (0,)
    assert distinct_experts(trace).tolist() == [0, 0]
