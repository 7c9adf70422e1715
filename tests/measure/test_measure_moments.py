"""Records of single sequences and tokens: what adds up to the counters, and what a hand counts."""

import numpy as np
import pytest
from small_olmoe import EXPERTS, LAYERS, PROMPT_TEXT, tiny_model, words_tokenizer

from melinoe import attach
from melinoe.cache.counters import COMPLETION, PROMPT, Counters
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, TraceBuilder
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import DataError
from melinoe.measure import serve, timeline_record, usage_record
from melinoe.measure.traces import hit_rates_by_layer
from melinoe.report.records import check


def small_trace():
    """One layer, 3 experts, top-2; two sequences of one prompt row and two completion rows."""
    builder = TraceBuilder(1, 3, 2)
    for sequence, rows in enumerate(([[0, 1], [0, 1], [0, 2]], [[0, 2], [2, 1], [2, -1]])):
        for row, experts in enumerate(rows):
            kind = PROMPT_ROW if row == 0 else COMPLETION_ROW
            builder.add_forward(np.array([[experts]]), sequence, kind)
    return builder.trace()


def test_usage_counts_the_completions_choices_of_each_sequence():
    """Prompt rows and choices of no expert count for nothing."""
    record = usage_record(small_trace(), "m")
    assert check(record, "here") == "usage"
    assert record["shown_layers"] == [0]
    assert record["counts"] == [[[2, 1, 1], [0, 1, 2]]]


def test_usage_shows_no_more_sequences_than_asked():
    """The first ones stay."""
    assert usage_record(small_trace(), "m", sequences=1)["counts"] == [[[2, 1, 1]]]


def test_the_timeline_adds_up_to_the_counters():
    """Loads by token and layer sum to what the handle counted; times are those of the tokens."""
    model = tiny_model()
    link = EmulatedLink(bandwidth_bytes_per_s=1e9, latency_s=5e-3)
    handle = attach(model, slots=2, link=link)
    handle.reset_counters()
    record = timeline_record(model, handle, words_tokenizer(), PROMPT_TEXT, 6, label="m")
    assert check(record, "here") == "timeline"
    counters = handle.counters
    assert record["prompt_loads"] == counters.loads[PROMPT].tolist()
    assert np.sum(record["loads"], axis=0).tolist() == counters.loads[COMPLETION].tolist()
    assert len(record["ms"]) == len(record["loads"]) == len(record["tokens"]) == 5
    assert np.shape(record["loads"]) == np.shape(record["hits"]) == (5, LAYERS)
    assert np.sum(record["hits"], axis=0).tolist() == counters.hits[COMPLETION].tolist()
    assert sum(record["stall_ms"]) <= sum(record["ms"])
    # Each load takes at least the link's 5 ms, of which a little passes before the wait begins.
    for stall_ms, loads in zip(record["stall_ms"], record["loads"], strict=True):
        assert stall_ms >= 4 * sum(loads)
    assert record["link"]["latency_us"] == pytest.approx(5000)


def test_a_timeline_of_one_token_is_refused():
    """There is nothing between tokens to show."""
    model = tiny_model()
    handle = attach(model, slots=2)
    with pytest.raises(DataError, match="fewer than two tokens"):
        timeline_record(model, handle, words_tokenizer(), PROMPT_TEXT, 1, label="m")


def test_a_serve_record_says_the_hit_rate_of_each_layer():
    """Every expert resident and warm: all layers hit always; their number is the model's."""
    model = tiny_model()
    handle = attach(model, slots=EXPERTS)
    record = serve(model, handle, words_tokenizer(), [PROMPT_TEXT], 6, label="m", cold=False)
    assert len(record["hit_rate_by_layer"]) == LAYERS
    counters = handle.counters
    expected = counters.hits[COMPLETION] / counters.uses[COMPLETION]
    assert [one["mean"] for one in record["hit_rate_by_layer"]] == pytest.approx(expected)


def test_a_layer_that_served_no_token_has_no_hit_rate():
    """Of three layers the second never ran: None in its place, so that numbers stay numbers."""
    counters = Counters(3)
    counters.begin_forward("completion", 1)
    counters.add_request(0, uses=2, hits=1, loads=1)
    counters.add_request(2, uses=4, hits=4, loads=0)
    counters.end_forward()
    first, second, third = hit_rates_by_layer([counters, counters])
    assert (first["mean"], second, third["mean"]) == (0.5, None, 1.0)
