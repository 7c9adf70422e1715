"""What nothing can be divided by is absent, and never 0: above all figures of no prefetch."""

import json

import numpy as np
import pytest
from trace_builder import TraceBuilder
from typer.testing import CliRunner

from melinoe.cache.counters import Counters
from melinoe.cache.prefetch import Listed
from melinoe.cache.simulator import simulate
from melinoe.cli.app import app
from melinoe.predictor.fit import recall_at

OF_PREFETCHES = ("prefetch_precision", "prefetch_recall", "prefetch_waste_per_token")


def decoded():
    """A prompt token and four more, two layers of four experts, top-1."""
    builder = TraceBuilder(2, 4, 1)
    for token in range(5):
        chosen = [[[token % 3], [token % 2]]]
        builder.add_forward(np.array(chosen), 0, int(token > 0))
    return builder.trace()


def test_without_a_prefetch_there_is_nothing_to_recall(tmp_path):
    """Neither in counters nor in the command's rows: None."""
    done = simulate(decoded(), 1)
    assert done.counters.loads.sum() > 0
    for name in OF_PREFETCHES:
        assert done.counters.metrics()[name] is None
    decoded().save(tmp_path / "t.safetensors")
    asked = ["simulate", str(tmp_path / "t.safetensors"), "--slots", "1", "--json"]
    (row, *_) = json.loads(CliRunner().invoke(app, asked).stdout)
    assert [row[name] for name in OF_PREFETCHES] == [None] * 3


def test_a_prefetch_that_brings_nothing_has_no_share_either():
    """Everything named is resident already: nothing was copied ahead."""
    everything = {0: [[0, 1, 2, 3]] * 2}
    done = simulate(decoded(), 4, prefetch=Listed(everything)).counters
    assert done.prefetch_precision() is not None and done.prefetch_recall() == 1
    done = simulate(decoded(), 4, prefetch=Listed({0: [[], []]})).counters
    assert [done.metrics()[name] for name in OF_PREFETCHES] == [None] * 3


def test_counters_of_nothing_have_no_measure():
    """No use, no token, no prefetch: every measure is absent, in every phase; a count is not."""
    nothing = Counters(2)
    assert set(nothing.metrics().values()) == {None}
    assert nothing.hit_rate() is nothing.adjusted_hit_rate() is nothing.on_host_per_token() is None


def test_a_layer_without_uses_has_no_rate():
    """The recall of a sequence without a completion: nan, not 0."""
    target = np.array([[[0.5, 0.5]], [[0.0, 0.0]]])
    assert recall_at(target, np.array([1, 0]), 1) == pytest.approx([0.5, np.nan], nan_ok=True)
