"""A report shows what a predictor's guess is worth, and whether it saves anything."""

from melinoe.report.records import read_records
from melinoe.report.tables import predictor_table


def record(**more):
    """A learned predictor that finds 9 of 10 experts, a rival that finds 8."""
    estimate = {"mean": 0.9, "low": 0.85, "high": 0.95, "n": 40}
    recall = {"learned": estimate, "popularity": {**estimate, "mean": 0.86}}
    return {"kind": "predictor", "model": "tiny", "slots": 8, "recall": recall, **more}


def rows(**more):
    table = predictor_table(read_records([record(**more)]))
    return [[cell.inline() for cell in row] for row in table.rows]


def test_transfers_that_loading_ahead_saves_stand_with_their_interval():
    """One that contains 0 is seen to."""
    saved = {"learned": {"mean": 0.25, "low": -0.25, "high": 0.75, "n": 40}}
    assert rows(saved=saved)[-1] == [
        "transfers a token saved by the learned predictor",
        "0.250 [-0.250 to 0.750]",
    ]


def test_records_without_transfers_say_nothing_of_them():
    """As those of earlier runs: the recall of both alone."""
    assert [name for name, _ in rows()] == [
        "recall of the learned predictor",
        "recall of global popularity",
    ]
