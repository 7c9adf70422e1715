"""Counters: what counts as what, worked by hand."""

import json

import pytest

from melinoe.cache.counters import Counters
from melinoe.cache.residency import Decision, Load


def filled():
    """A prompt pass of 10 rows with loads, a completion pass without, one with; 2 layers, top-2."""
    counters = Counters(2)
    counters.add_prefetch(1, 3)
    counters.begin_forward("prompt", 10)
    counters.add_request(0, uses=20, hits=5, loads=4, decisions=2)
    counters.add_request(1, uses=20, hits=20, loads=0)
    counters.end_forward()
    counters.begin_forward("completion", 1)
    counters.add_request(0, uses=2, hits=2, loads=0)
    counters.add_request(1, uses=2, hits=2, loads=0)
    counters.end_forward()
    counters.begin_forward("completion", 3)
    counters.add_request(0, uses=6, hits=6, loads=0)
    counters.add_request(1, uses=6, hits=1, loads=2)
    counters.end_forward()
    return counters


def test_metrics_worked_by_hand():
    """56 uses, 36 hits, 6 demand and 3 prefetch loads; 4 completion tokens, 1 of them free."""
    counters = filled()
    assert counters.hit_rate() == 36 / 56
    assert counters.hit_rate("prompt") == 25 / 40
    assert counters.hit_rate("completion") == 11 / 16
    assert counters.adjusted_hit_rate() == 1 - 9 / 56
    assert counters.transfers_per_token() == 2 / 4
    assert counters.transfers_per_token("prompt") == 4 / 10
    assert counters.prefetch_per_token() == 3 / 4
    assert counters.zero_miss_share() == 1 / 4
    assert counters.zero_miss_share("prompt") == 0
    assert counters.forwards.tolist() == [1, 2]
    assert counters.zero_miss_forwards.tolist() == [0, 1]
    assert counters.chunked.tolist() == [[1, 0], [0, 0]]
    assert counters.metrics()["zero_miss_tokens"] == 1 / 4


def test_one_miss_in_the_last_layer_makes_all_rows_of_the_pass_wait():
    """zero_miss_tokens counts rows of whole passes, since a layer computes all its rows at once."""
    counters = Counters(2)
    counters.begin_forward("completion", 5)
    counters.add_request(0, 10, 10, 0)
    counters.add_request(1, 10, 9, 1)
    counters.end_forward()
    assert counters.zero_miss_tokens.tolist() == [0, 0]


def test_hits_of_decisions_weigh_by_uses_and_only_what_was_resident_at_first():
    """Experts 0, 1, 2 with uses 5, 1, 3; 0 resident: 5 hits of 9 uses, 2 loads, two decisions."""
    counters = Counters(1)
    counters.begin_forward(0, 9)
    decisions = [Decision((0,), (Load(1, 1, None),)), Decision((), (Load(2, 0, 0),))]
    counters.add_decisions(0, [0, 1, 2], [5, 1, 3], decisions)
    assert (counters.uses[0, 0], counters.hits[0, 0], counters.loads[0, 0]) == (9, 5, 2)
    assert counters.chunked[0, 0] == 1


def test_nothing_counted_is_absent_and_not_zero():
    """Rates without a denominator are None."""
    assert set(Counters(1).metrics().values()) == {None}


def test_a_copy_is_independent_and_minus_gives_what_came_since():
    """Counting on does not touch the copy; the difference is the new pass alone."""
    counters = filled()
    copy = counters.copy()
    assert copy == counters
    counters.begin_forward("completion", 1)
    counters.add_request(0, 2, 1, 1)
    counters.end_forward()
    assert copy != counters
    since = counters.minus(copy)
    assert (since.uses.sum(), since.loads.sum(), since.tokens.sum()) == (2, 1, 1)
    assert since.plus(copy) == counters


def test_arrays_read_from_counters_do_not_write_to_them():
    """What a reader gets is a copy."""
    counters = filled()
    counters.uses[:] = 0
    assert counters == filled()


def test_counters_survive_json():
    """to_dict, JSON, from_dict: equal."""
    counters = filled()
    assert Counters.from_dict(json.loads(json.dumps(counters.to_dict()))) == counters


@pytest.mark.parametrize(
    "change",
    [{"uses": [[1]]}, {"loads": [[0.5, 0], [0, 0]]}, {"odd": 1}, {"num_layers": 3}],
)
def test_a_dictionary_of_another_shape_is_refused(change):
    """Wrong shapes, fractions, unknown fields, another number of layers."""
    with pytest.raises(ValueError, match="not a dictionary of counters"):
        Counters.from_dict(filled().to_dict() | change)


def test_counting_outside_a_pass_is_refused():
    """The phase would be unknown."""
    counters = Counters(1)
    with pytest.raises(ValueError, match="begin_forward"):
        counters.add_request(0, 1, 1, 0)
    with pytest.raises(ValueError, match="not begun"):
        counters.end_forward()


def test_a_pass_left_open_is_dropped():
    """An exception ended it: its request stays counted, its tokens do not."""
    counters = Counters(1)
    counters.begin_forward(1, 7)
    counters.add_request(0, 2, 1, 1)
    counters.begin_forward(1, 1)
    counters.end_forward()
    assert counters.tokens.tolist() == [0, 1]
    assert counters.loads.sum() == 1
    assert counters.zero_miss_forwards.tolist() == [0, 1]


def test_counters_of_different_models_do_not_mix():
    """Two layers minus one layer is a mistake."""
    with pytest.raises(ValueError, match="layers"):
        Counters(2).minus(Counters(1))
    assert Counters(2) != Counters(1)
