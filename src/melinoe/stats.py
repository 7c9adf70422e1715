"""
Means with an interval: the percentile bootstrap over prompts.

A rate over prompts, such as hits per use, is a ratio of sums, not a mean of ratios: a long answer
counts for more than a short one. Resampling draws whole prompts, because the tokens of one prompt
are not independent of each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from melinoe.errors import DataError

Floats = NDArray[np.float64]
Values = Sequence[float] | Floats  # one number a prompt
_CHUNK_ELEMENTS = 4_000_000  # draws held at once: 32 MB of indices


@dataclass(frozen=True)
class Estimate:
    """A statistic over *n* prompts and its interval, which has no width if *n* is 1."""

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Return ``{"mean", "low", "high", "n"}``, as records hold it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def from_dict(cls, data: Mapping[str, float]) -> "Estimate":
        """Read what `to_dict` wrote."""
        return cls(float(data["mean"]), float(data["low"]), float(data["high"]), int(data["n"]))


def bootstrap(
    values: Values,
    weights: Values | None = None,
    resamples: int = 2000,
    seed: int = 0,
    transform: Callable[[Floats], Floats] | None = None,
) -> Estimate:
    """
    Estimate ``sum(values) / sum(weights)`` with a 95 % percentile interval over prompts.

    *transform* is applied to the ratio, elementwise; ``np.exp`` turns a mean loss into perplexity.
    Equal seeds and lengths draw the same prompts.

    Raises:
        DataError: no prompts, a value that is not finite, or denominators that sum to zero.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    columns = _checked(values, weights)
    return _interval(lambda sums: sums[0] / sums[1], columns, transform, resamples, seed)


def paired_difference(
    ours: Values,
    theirs: Values,
    our_weights: Values | None = None,
    their_weights: Values | None = None,
    transform: Callable[[Floats], Floats] | None = None,
) -> Estimate:
    """
    Estimate our rate minus theirs, on the same prompts; entry i of both belongs to the same one.

    Each resample draws a prompt for both, so that what makes a prompt hard cancels.
    """
    columns = _paired((ours, our_weights), (theirs, their_weights))
    return _interval(lambda s: s[0] / s[1] - s[2] / s[3], columns, transform)


def paired_ratio(
    ours: Values,
    theirs: Values,
    our_weights: Values | None = None,
    their_weights: Values | None = None,
) -> Estimate:
    """Estimate our rate divided by theirs, on the same prompts; DataError where theirs is zero."""
    columns = _paired((ours, our_weights), (theirs, their_weights))
    if columns[2].sum() == 0:
        raise DataError(
            "the rate to compare with is zero, so a ratio has no meaning; compare differences"
        )
    return _interval(lambda s: (s[0] / s[1]) / (s[2] / s[3]), columns)


def _checked(values: Values, weights: Values | None) -> list[Floats]:
    """Give numerators and denominators as arrays; refuse what has no mean."""
    above = np.asarray(values, dtype=np.float64)
    below = np.ones_like(above) if weights is None else np.asarray(weights, dtype=np.float64)
    if above.ndim != 1 or above.shape != below.shape:
        raise ValueError(
            f"need one value and one weight a prompt, got {above.shape} and {below.shape}"
        )
    if above.size == 0:
        raise DataError("there is nothing to average; give at least one prompt")
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise DataError(
            "a measured value is not finite; look for an overflow in the model's output"
        )
    if (below < 0).any():
        raise ValueError("weights must not be negative")
    if below.sum() == 0:
        raise DataError("nothing was counted in any prompt; give longer prompts or more tokens")
    return [above, below]


def _paired(*sides: tuple[Values, Values | None]) -> list[Floats]:
    first, second = (_checked(*side) for side in sides)
    if first[0].size != second[0].size:
        raise ValueError(f"cannot pair {first[0].size} prompts with {second[0].size}")
    return first + second


def _interval(
    statistic: Callable[[list[Floats]], Floats],
    columns: list[Floats],
    transform: Callable[[Floats], Floats] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Take *statistic* of the columns' sums, once over all prompts and once per resample."""

    def apply(sums: list[Floats]) -> Floats:
        return statistic(sums) if transform is None else transform(statistic(sums))

    count = columns[0].size
    mean = float(apply([np.asarray([column.sum()]) for column in columns])[0])
    if count == 1:
        return Estimate(mean, mean, mean, 1)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_ELEMENTS // count)
    parts = []
    for start in range(0, resamples, step):
        draws = rng.integers(0, count, size=(min(step, resamples - start), count))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(apply([column[draws].sum(axis=1) for column in columns]))
    drawn = np.concatenate(parts)
    # A resample may hold only prompts whose denominator is zero; it says nothing about the rate.
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    return Estimate(mean, float(low), float(high), count)
