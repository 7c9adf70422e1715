"""Two models on the same examples: hand-worked differences, and what is said of them."""

import numpy as np
import pytest

from melinoe.errors import DataError
from melinoe.evaluate import Perplexity, Scores, compare_perplexity, compare_scores
from melinoe.report.records import check


def scores(ours, theirs, metric="exact_match", **more):
    return compare_scores(np.asarray(ours), np.asarray(theirs), "m", "o", "text", metric, **more)


def test_a_clear_difference_names_the_better_model():
    """Nine of ten right against one of ten, the same one: .8 more, and m is better."""
    found = scores([1.0] * 9 + [0.0], [1.0] + [0.0] * 9)
    assert found.change.mean == pytest.approx(0.8)
    assert found.better == "m"
    assert found.sentence.startswith("exact match on text, m against o: +0.800 [")
    assert found.sentence.endswith("; m is better")


def test_an_interval_that_holds_zero_names_none():
    """One example each way, in ten."""
    found = scores([1.0, 0.0] + [0.0] * 8, [0.0, 1.0] + [0.0] * 8)
    assert found.change.mean == 0 and found.change.low < 0 < found.change.high
    assert found.better is None
    assert "contains no difference" in found.sentence


def test_equal_scores_show_no_difference():
    """The interval has no width and is zero."""
    assert scores([0.0] * 5, [0.0] * 5).better is None


def test_one_example_shows_nothing():
    """With n = 1 an interval has no width either, but the difference is not zero."""
    found = scores([1.0], [0.0])
    assert found.better is None and "one example alone" in found.sentence


def test_perplexity_is_compared_as_a_ratio_and_less_is_better():
    """.1 nat a token less on every text: 1 - exp(-.1) = 9.5 % less, without any width."""
    theirs = Perplexity(np.asarray([10.0, 3.0, 40.0]), np.asarray([5.0, 4.0, 9.0]))
    ours = Perplexity(theirs.nll - 0.1 * theirs.tokens, theirs.tokens)
    found = compare_perplexity(ours, theirs, "m", "o", "text")
    assert found.change.mean == pytest.approx(np.expm1(-0.1))
    assert found.better == "m"
    assert "-9.5 % [-9.5, -9.5]" in found.sentence


def test_different_examples_are_not_compared():
    """Three against two."""
    with pytest.raises(DataError, match="evaluate both on the same"):
        scores([1.0] * 3, [1.0] * 2)


def test_records_are_those_that_reports_read():
    """Every record of two models, and of their comparison, passes the report's own check."""
    nll, tokens = np.asarray([4.0, 6.0]), np.asarray([2.0, 3.0])
    found = [
        Scores(
            name,
            "text",
            True,
            Perplexity(nll * factor, tokens),
            {"exact_match": np.asarray([1.0, 0.0]), "rouge_l": np.asarray([0.25, 0.5])},
        )
        for name, factor in (("m", 1.0), ("o", 1.5))
    ]
    comparisons = found[0].against(found[1])
    assert [one.metric for one in comparisons] == ["perplexity", "exact_match", "rouge_l"]
    records = [*found[0].records(), *(one.to_record() for one in comparisons)]
    kinds = ["quality", "score", "score", "comparison", "comparison", "comparison"]
    assert [check(record, "here") for record in records] == kinds
    assert records[1]["right"] == 1 and records[1]["score"]["mean"] == 0.5
    assert records[0]["per_sequence"] == {"nll": [4.0, 6.0], "tokens": [2, 3]}
