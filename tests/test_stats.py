"""Intervals over prompts: against hand-worked sums, closed forms and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from melinoe.errors import DataError
from melinoe.stats import Estimate, bootstrap, paired_difference, paired_ratio


def test_a_rate_is_a_ratio_of_sums():
    """1 hit of 2 uses and 9 of 10 make 10 of 12, not the mean of .5 and .9."""
    assert bootstrap([1, 9], [2, 10]).mean == pytest.approx(10 / 12)


def test_without_weights_the_estimate_is_the_mean():
    """The mean of 1, 2 and 6 is 3."""
    assert bootstrap([1, 2, 6]).mean == 3


def test_two_prompts_give_the_interval_of_all_four_draws():
    """Drawing two of {0, 1} gives 0, .5, .5 or 1, so 95 % of the draws reach from 0 to 1."""
    means = sorted(sum(pair) / 2 for pair in itertools.product([0, 1], repeat=2))
    estimate = bootstrap([0, 1])
    assert (estimate.low, estimate.high) == (means[0], means[-1])


def test_the_interval_of_a_mean_agrees_with_the_normal_one():
    """For 400 draws of a normal variable the percentile interval is mean -+ 1.96 s / sqrt(n)."""
    values = np.random.default_rng(3).normal(5, 2, 400)
    half = 1.96 * values.std() / math.sqrt(values.size)
    estimate = bootstrap(values, resamples=4000)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)


def test_intervals_of_a_ratio_cover_the_truth_as_often_as_they_say():
    """Of 200 experiments with a known rate of .7, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        uses = rng.integers(20, 200, 60)
        hits = rng.binomial(uses, np.clip(rng.normal(0.7, 0.05, 60), 0, 1))
        estimate = bootstrap(hits, uses, resamples=400, seed=trial)
        covered += estimate.low <= 0.7 <= estimate.high
    # 3 standard deviations of a binomial(200, .95) are 9; the bootstrap is a little narrow.
    assert 178 <= covered <= 199


def test_a_transform_moves_mean_and_bounds_alike():
    """exp of a mean loss is perplexity, and exp is monotone, so the bounds are exp of bounds."""
    plain = bootstrap([1.0, 2.0, 4.0], [1, 2, 3])
    moved = bootstrap([1.0, 2.0, 4.0], [1, 2, 3], transform=np.exp)
    assert moved.mean == pytest.approx(math.exp(plain.mean))
    assert moved.low == pytest.approx(math.exp(plain.low))
    assert moved.high == pytest.approx(math.exp(plain.high))


def test_pairing_cancels_what_makes_a_prompt_hard():
    """Ours is theirs + 1 on every prompt: the difference is exactly 1, whatever is drawn."""
    theirs = np.asarray([1.0, 50.0, 3.0, 200.0])
    estimate = paired_difference(theirs + 1, theirs)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((1, 1, 1))


def test_a_paired_ratio_of_proportional_rates_is_exact():
    """Ours uses three times the loads on every prompt, at other token counts: ratio 3."""
    theirs, tokens = np.asarray([2.0, 8.0, 5.0]), np.asarray([4.0, 5.0, 6.0])
    estimate = paired_ratio(3 * theirs, theirs, tokens, tokens)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((3, 3, 3))


def test_equal_seeds_give_equal_intervals():
    """The draw depends on the seed alone."""
    values = np.arange(20.0)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_drawing_in_chunks_changes_nothing_about_the_size(monkeypatch):
    """With chunks of a single resample there are as many draws, and the mean is the same."""
    whole = bootstrap(np.arange(50.0), resamples=500)
    monkeypatch.setattr("melinoe.stats._CHUNK_ELEMENTS", 50)
    assert bootstrap(np.arange(50.0), resamples=500) == whole


def test_one_prompt_has_no_width_and_says_so():
    """n = 1 marks an interval that means nothing."""
    assert bootstrap([3.0], [2.0]) == Estimate(1.5, 1.5, 1.5, 1)


def test_prompts_that_count_nothing_are_harmless():
    """A prompt without completion tokens adds neither hits nor uses; draws of it alone drop out."""
    estimate = bootstrap([1, 0, 1], [2, 0, 2])
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "weights"), [([], None), ([1.0], [0.0]), ([float("nan"), 1.0], None)]
)
def test_data_that_has_no_mean_is_refused(values, weights):
    """No prompts, nothing counted, and nan each get one sentence."""
    with pytest.raises(DataError):
        bootstrap(values, weights)


def test_a_ratio_to_zero_is_refused():
    """Dividing by a rate of zero has no meaning."""
    with pytest.raises(DataError, match="ratio has no meaning"):
        paired_ratio([1.0], [0.0])


@pytest.mark.parametrize(("values", "weights"), [([1.0, 2.0], [1.0]), ([1.0], [-1.0])])
def test_shapes_that_do_not_fit_are_the_callers_mistake(values, weights):
    """One weight a prompt, none below zero."""
    with pytest.raises(ValueError):
        bootstrap(values, weights)


def test_different_prompt_counts_cannot_be_paired():
    """Three prompts against two is no pairing."""
    with pytest.raises(ValueError, match="pair"):
        paired_difference([1.0, 2, 3], [1.0, 2])


def test_an_estimate_survives_its_dict():
    """What a record holds reads back as the same estimate."""
    estimate = Estimate(1.0, 0.5, 1.5, 7)
    assert Estimate.from_dict(estimate.to_dict()) == estimate
