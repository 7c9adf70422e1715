"""What nothing can be divided by is absent, and never 0: above all figures of no prefetch."""

import numpy as np
import pytest

from melinoe.cache.counters import Counters
from melinoe.predictor.fit import recall_at


def test_counters_of_nothing_have_no_measure():
    """No use, no token, no prefetch: every measure is absent, in every phase; a count is not."""
    nothing = Counters(2)
    assert set(nothing.metrics().values()) == {None}
    assert nothing.hit_rate() is nothing.adjusted_hit_rate() is nothing.on_host_per_token() is None


def test_a_layer_without_uses_has_no_rate():
    """The recall of a sequence without a completion: nan, not 0."""
    target = np.array([[[0.5, 0.5]], [[0.0, 0.0]]])
    assert recall_at(target, np.array([1, 0]), 1) == pytest.approx([0.5, np.nan], nan_ok=True)
