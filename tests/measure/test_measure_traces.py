"""A trace to records: locality and curves, worked by hand."""

import numpy as np
import pytest
from trace_builder import TraceBuilder
from two_sequences import small_trace

from melinoe.cache.trace import PROMPT_ROW
from melinoe.errors import DataError
from melinoe.measure import (
    curve_record,
    locality_record,
)


def test_locality_is_worked_by_hand():
    """2 and 1 experts a sequence; reuse 1 of 3 and 3 of 3; three experts in all."""
    record = locality_record(small_trace(), "m")
    assert record["experts_per_sequence"] == [2, 1]
    assert record["reuse"]["mean"] == pytest.approx((1 / 3 + 1) / 2)
    assert record["distinct_experts"] == 3
    assert (record["kind"], record["model"], record["num_experts"]) == ("locality", "m", 4)


def test_a_curve_is_worked_by_hand():
    """One slot, cold: of 0 1 0 the first hits (the prompt left 0), of 2 2 2 all: 4 of 6 uses.

    Two slots: 1 misses once, 5 of 6.
    """
    record = curve_record(small_trace(), "m", "lru", [1, 2, 4])
    assert [rate["mean"] for rate in record["hit_rate"]] == pytest.approx([4 / 6, 5 / 6, 5 / 6])
    assert record["slots"] == [1, 2, 4]
    assert record["hit_rate"][0]["n"] == 2


def test_a_trace_of_prompts_alone_has_no_locality():
    """Locality is of the completion."""
    builder = TraceBuilder(1, 4, 1)
    builder.add_forward(np.zeros((2, 1, 1), int), 0, PROMPT_ROW)
    with pytest.raises(DataError):
        locality_record(builder.trace(), "m")
    with pytest.raises(DataError):
        curve_record(builder.trace(), "m", "lru", [1])
