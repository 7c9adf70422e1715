"""Two models on the same examples: hand-worked differences, and what is said of them."""

import numpy as np
import pytest

from melinoe.evaluate import Perplexity, compare_perplexity, compare_rates, quality_record
from melinoe.report.records import check


def rates(ours, theirs):
    """Loads of one token an example each."""
    ones = [1.0] * len(ours)
    return compare_rates((ours, ones), (theirs, ones), "m", "o", "text", "transfers per token")


def test_a_clear_difference_names_the_better_model():
    """Half the loads on every example: 50 % less without any width, and m is better."""
    found = rates([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert found.change.mean == pytest.approx(-0.5) and found.better == "m"
    assert found.sentence == (
        "transfers per token on text, m against o: -50.0 % [-50.0, -50.0]; m is better"
    )
    assert rates([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]).better == "o"


def test_an_interval_that_holds_zero_names_none():
    """One example each way, in ten."""
    found = rates([2.0, 1.0] + [1.0] * 8, [1.0, 2.0] + [1.0] * 8)
    assert found.change.mean == 0 and found.change.low < 0 < found.change.high
    assert found.better is None
    assert "contains no difference" in found.sentence


def test_equal_rates_show_no_difference():
    """The interval has no width and is zero."""
    assert rates([1.0] * 5, [1.0] * 5).better is None


def test_one_example_shows_nothing():
    """With n = 1 an interval has no width either, but the difference is not zero."""
    found = rates([1.0], [2.0])
    assert found.better is None and "one example alone" in found.sentence


def test_perplexity_is_compared_as_a_ratio_and_less_is_better():
    """.1 nat a token less on every text: 1 - exp(-.1) = 9.5 % less, without any width."""
    theirs = Perplexity(np.asarray([10.0, 3.0, 40.0]), np.asarray([5.0, 4.0, 9.0]))
    ours = Perplexity(theirs.nll - 0.1 * theirs.tokens, theirs.tokens)
    found = compare_perplexity(ours, theirs, "m", "o", "text")
    assert found.change.mean == pytest.approx(np.expm1(-0.1))
    assert found.better == "m"
    assert "-9.5 % [-9.5, -9.5]" in found.sentence


def test_records_are_those_that_reports_read():
    """A model's record, and that of a comparison, pass the report's own check."""
    found = Perplexity(np.asarray([4.0, 6.0]), np.asarray([2.0, 3.0]))
    record = quality_record(found, "m", "text", True)
    assert check(record, "here") == "quality"
    assert record["per_sequence"] == {"nll": [4.0, 6.0], "tokens": [2, 3]}
    assert check(compare_perplexity(found, found, "m", "o", "text").to_record(), "here") == (
        "comparison"
    )
