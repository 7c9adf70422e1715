"""The price as the user names it, and who finds the strength that keeps it."""

import json
import math

import numpy as np
import pytest

from melinoe.errors import TrainingError
from melinoe.finetune.price.strength import StrengthController, next_strength, parse_increase


@pytest.mark.parametrize(
    ("text", "share"),
    [("1%", 0.01), ("0.01", 0.01), (0.03, 0.03), (" 2.5 % ", 0.025), ("150%", 1.5)],
)
def test_an_increase_is_a_share_or_a_percentage(text, share):
    """Both spellings mean the same number."""
    assert parse_increase(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "0", "-1%", "much", "nan", "inf%"])
def test_an_increase_that_means_nothing_is_refused(text):
    """A bare 1 could be 1 % or 100 %; the message says how to write it."""
    with pytest.raises(TrainingError, match="write"):
        parse_increase(text)


def test_one_update_worked_by_hand():
    """Budget .01, gap .012, target .8: u = 1.2, e = -.4; weight .5 exp(.1 x -.4).

    Then gap .004: u = (1.2 + .4) / 2 = .8, e = 0, change .4: times exp(.1 x 0 + .2 x .4).
    """
    controller = StrengthController(
        0.5, {"own": 0.01}, target=0.8, integral=0.1, proportional=0.2, smoothing=0.5
    )
    first = controller.update({"own": 0.012})
    assert first == pytest.approx(0.5 * math.exp(-0.04))
    assert controller.update({"own": 0.004}) == pytest.approx(first * math.exp(0.08))


def test_the_budget_that_is_spent_most_decides():
    """Own text has room, other text has none: the weight falls."""
    controller = StrengthController(0.5, {"own": 0.01, "other": 0.03})
    assert controller.update({"own": 0.0, "other": 0.06}) < 0.5


def test_the_weight_stays_between_floor_and_ceiling_and_nan_moves_nothing():
    """However long the gap is one-sided; and what is not finite is no measurement."""
    controller = StrengthController(1.0, {"own": 0.01}, floor=0.1, ceiling=4.0)
    for _ in range(99):
        controller.update({"own": 9.0})
    assert controller.strength == 0.1
    assert controller.update({"own": math.nan}) == 0.1
    for _ in range(99):
        controller.update({"own": -9.0})
    assert controller.strength == 4.0


@pytest.mark.parametrize("start", [0.02, 0.5, 8.0])
@pytest.mark.parametrize("exponent", [0.7, 1.2, 2.0])
def test_the_controller_settles_where_the_budget_is_spent(start, exponent):
    """A plant that answers late and noisily: gap follows k strength^exponent with a lag.

    After 60 measurements the mean gap of the next 20 is between 60 and 105 % of the budget.
    """
    noise = np.random.default_rng(0)
    controller, gap, late = StrengthController(start, {"own": 0.01}), 0.0, []
    for turn in range(80):
        gap += 0.4 * (0.03 * controller.strength**exponent - gap)
        controller.update({"own": gap + 0.001 * noise.standard_normal()})
        if turn >= 60:
            late.append(gap)
    assert 0.006 < np.mean(late) < 0.0105


def test_a_controller_goes_on_from_its_state():
    """Through JSON, the continuation is the same number for number."""
    first, second = (StrengthController(0.5, {"own": 0.01}) for _ in range(2))
    for gap in (0.02, 0.004, 0.013):
        first.update({"own": gap})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for gap in (0.001, 0.03):
        assert first.update({"own": gap}) == second.update({"own": gap})


def test_the_next_strength_worked_by_hand():
    """Half the target spent at .4 and exponent 1: .8. Four times it: .1. Far off: eight times.

    Two runs: spent .8 at .5 and 3.2 at 1, exponent 2: the target .2 is a factor of 2 below .5.
    """
    one = {"target": 0.8, "slope": 1.0}
    assert next_strength([(0.4, 0.4)], **one) == pytest.approx(0.8)
    assert next_strength([(0.4, 3.2)], **one) == pytest.approx(0.1)
    assert next_strength([(0.4, -1.0)], **one) == pytest.approx(3.2)
    assert next_strength([(0.5, 0.8), (1.0, 3.2)], target=0.2) == pytest.approx(0.25)


@pytest.mark.parametrize("exponent", [0.7, 1.2, 2.0])
@pytest.mark.parametrize("right", [0.02, 0.2, 3.0])
def test_the_search_is_near_within_four_runs(exponent, right):
    """Started at .5, a run's cost a power of the weight with 5 % noise: one spends .65 to 1."""
    noise, tried, weight = np.random.default_rng(1), [], 0.5
    for _ in range(4):
        spent = 0.85 * (weight / right) ** exponent * (1 + 0.05 * noise.standard_normal())
        tried.append((weight, spent))
        weight = next_strength(tried)
    assert any(0.65 <= spent <= 1 for _, spent in tried), tried
