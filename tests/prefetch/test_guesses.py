"""What the next routers said early: merged, kept in a trace, and asked for where it is missing."""

import numpy as np
import pytest
from prefetch_traces import decoding

from melinoe.cache.prefetch import NextRouter, Timed
from melinoe.cache.requests import merge_guesses
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace, TraceBuilder
from melinoe.errors import TraceError


@pytest.mark.parametrize(
    ("rows", "merged"),
    [
        ([[5, 2, 9]], [5, 2, 9]),
        ([[5, -1, 9]], [5, 9]),
        ([[5, 2], [2, 7]], [2, 5, 7]),  # 2 twice; 5 stands first in a row, 7 second
        ([[4, 1], [3, 1], [-1, -1]], [1, 3, 4]),  # 3 and 4 are alike, so by id
        ([[-1, -1]], []),
        ([], []),
    ],
)
def test_guesses_of_several_rows_are_ranked_by_how_many_share_them(rows, merged):
    """Then by their place in a row, then by id."""
    assert merge_guesses(rows) == merged


def test_a_trace_without_guesses_or_prompts_is_refused_by_what_needs_them():
    """The sentence says what to record or to give; prompts of other lengths are refused too."""
    builder = TraceBuilder(1, 4, 1)
    builder.add_forward(np.array([[[1]], [[2]]]), 0, 0)
    trace = builder.trace()

    class Reader(Timed):
        name, uses_ids = "reader", True

        def named(self, prompt):
            return [[prompt.ids[0]]]

    with pytest.raises(TraceError, match="record one with guesses"):
        simulate(trace, 2, prefetch=NextRouter())
    with pytest.raises(TraceError, match="give the prompts"):
        simulate(trace, 2, prefetch=Reader())
    for prompts in ([[1]], [[1, 2], [3, 4]]):
        with pytest.raises(TraceError, match="in their order"):
            simulate(trace, 2, prefetch=Reader(), prompts=prompts)
    done = simulate(trace, 2, prefetch=Reader("prompt"), prompts=[[3, 0]])
    assert done.counters.prefetch_loads.tolist() == [1]


def test_guesses_are_kept_in_a_trace_of_version_3(tmp_path):
    """Round trip and selection; without guesses the file is of version 1."""
    trace = decoding([[[0], [0]], [[1], [2]]], [[0], [3]])
    trace.save(tmp_path / "t")
    again = Trace.load(tmp_path / "t")
    assert np.array_equal(again.guesses, trace.guesses) and again.guesses.dtype == np.int16
    assert b'version\\": 3' in (tmp_path / "t").read_bytes()
    assert np.array_equal(trace.select([0]).guesses, trace.guesses)
    plain = TraceBuilder(2, 4, 1)
    plain.add_forward(np.array([[[0], [1]]]), 0, 1)
    plain.trace().save(tmp_path / "p")
    assert b'version\\": 1' in (tmp_path / "p").read_bytes()
    with pytest.raises(TraceError, match="guesses ids from -1 to 9"):
        Trace(**{**vars(trace), "guesses": np.where(trace.guesses == 3, 9, trace.guesses)})
