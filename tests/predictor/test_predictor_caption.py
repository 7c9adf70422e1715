"""A report says in words what a predictor's guess is worth, and whether it saves anything."""

import pytest

from melinoe.report.figures.predictor import predictor_caption


def record(low, high):
    """A learned predictor that finds 9 of 10 experts, and saves between *low* and *high*."""
    estimate = {"mean": 0.9, "low": 0.85, "high": 0.95, "n": 40}
    saved = {"mean": (low + high) / 2, "low": low, "high": high, "n": 40}
    return {
        "slots": 8,
        "recall": {"learned": estimate, "popularity": {**estimate, "mean": 0.8}},
        "winner": "learned",
        "saved": {"learned": saved},
    }


@pytest.mark.parametrize(
    "low, high, said",
    [
        (0.25, 0.75, "the learned predictor saves 0.500 [0.250, 0.750] transfers a token."),
        (-0.75, -0.25, "transfers a token, so loading ahead was not shown to save any."),
        (-0.25, 0.75, "transfers a token, so loading ahead was not shown to save any."),
    ],
)
def test_the_caption_says_whether_loading_ahead_saves(low, high, said):
    """Only an interval above 0 counts as a saving."""
    assert said in predictor_caption({"tiny": record(low, high)})


def test_records_without_transfers_say_nothing_of_them():
    """As those of earlier runs."""
    plain = record(0.25, 0.75)
    del plain["saved"]
    assert "loaded ahead" not in predictor_caption({"tiny": plain})
