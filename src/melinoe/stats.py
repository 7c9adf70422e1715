"""
Means with an interval: the percentile bootstrap over prompts.

A rate over prompts, such as hits per use, is a ratio of sums, not a mean of ratios: a long answer
counts for more than a short one. Resampling draws whole prompts, because the tokens of one prompt
are not independent of each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from melinoe.errors import DataError

Floats = NDArray[np.float64]
_CHUNK_ELEMENTS = 4_000_000  # draws held at once: 32 MB of indices


@dataclass(frozen=True)
class Estimate:
    """
    A statistic over *n* prompts and its interval.

    With one prompt there is nothing to resample: *low* and *high* equal *mean*, and *n* says so.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Return ``{"mean", "low", "high", "n"}``, as records hold it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def from_dict(cls, data: dict[str, float]) -> "Estimate":
        """Read what `to_dict` wrote."""
        return cls(float(data["mean"]), float(data["low"]), float(data["high"]), int(data["n"]))


def bootstrap(
    values: Sequence[float] | Floats,
    weights: Sequence[float] | Floats | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    transform: Callable[[Floats], Floats] | None = None,
) -> Estimate:
    """
    Estimate ``sum(values) / sum(weights)`` with a percentile interval over prompts.

    Args:
        values: One numerator per prompt, for example its hits.
        weights: One denominator per prompt, for example its uses; ``None`` means 1 each, which
            makes the estimate the plain mean.
        level: Share of the resampled statistics that the interval holds.
        resamples: How many times n prompts are drawn with replacement.
        seed: Of the draw; equal seeds and lengths draw the same prompts.
        transform: Applied to the ratio, elementwise; ``np.exp`` turns a mean loss into perplexity.

    Raises:
        DataError: no prompts, a value that is not finite, or denominators that sum to zero.
        ValueError: lengths differ, or *level* or *resamples* make no sense.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    numerators, denominators = _checked(values, weights)
    return _interval(
        lambda sums: sums[0] / sums[1],
        [numerators, denominators],
        (level, resamples, seed),
        transform,
    )


def paired_difference(
    ours: Sequence[float] | Floats,
    theirs: Sequence[float] | Floats,
    our_weights: Sequence[float] | Floats | None = None,
    their_weights: Sequence[float] | Floats | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    transform: Callable[[Floats], Floats] | None = None,
) -> Estimate:
    """
    Estimate our rate minus theirs, on the same prompts.

    Each resample draws a prompt for both, so that what makes a prompt hard cancels.

    Args:
        ours: One numerator per prompt.
        theirs: The same of the other model; entry i belongs to the same prompt as ``ours[i]``.
        our_weights: Denominators; ``None`` means 1 each.
        their_weights: Likewise.
        level: As in `bootstrap`.
        resamples: As in `bootstrap`.
        seed: As in `bootstrap`.
        transform: Applied to the difference, elementwise.

    Raises:
        DataError: as in `bootstrap`.
        ValueError: as in `bootstrap`, or the two have different numbers of prompts.
    """
    sums = _paired(ours, our_weights, theirs, their_weights)
    return _interval(lambda s: s[0] / s[1] - s[2] / s[3], sums, (level, resamples, seed), transform)


def paired_ratio(
    ours: Sequence[float] | Floats,
    theirs: Sequence[float] | Floats,
    our_weights: Sequence[float] | Floats | None = None,
    their_weights: Sequence[float] | Floats | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """
    Estimate our rate divided by theirs, on the same prompts; arguments as in `paired_difference`.

    Raises:
        DataError: as in `bootstrap`, or their rate is zero.
        ValueError: as in `paired_difference`.
    """
    sums = _paired(ours, our_weights, theirs, their_weights)
    if sums[2].sum() == 0:
        raise DataError(
            "the rate to compare with is zero, so a ratio has no meaning; compare differences"
        )
    return _interval(lambda s: (s[0] / s[1]) / (s[2] / s[3]), sums, (level, resamples, seed), None)


def _checked(
    values: Sequence[float] | Floats, weights: Sequence[float] | Floats | None
) -> tuple[Floats, Floats]:
    numerators = np.asarray(values, dtype=np.float64)
    denominators = (
        np.ones_like(numerators) if weights is None else np.asarray(weights, dtype=np.float64)
    )
    if numerators.ndim != 1 or numerators.shape != denominators.shape:
        raise ValueError(
            f"need one value and one weight a prompt, got {numerators.shape} and "
            f"{denominators.shape}"
        )
    if numerators.size == 0:
        raise DataError("there is nothing to average; give at least one prompt")
    if not (np.isfinite(numerators).all() and np.isfinite(denominators).all()):
        raise DataError(
            "a measured value is not finite; look for an overflow in the model's output"
        )
    if (denominators < 0).any():
        raise ValueError("weights must not be negative")
    if denominators.sum() == 0:
        raise DataError("nothing was counted in any prompt; give longer prompts or more tokens")
    return numerators, denominators


def _paired(
    ours: Sequence[float] | Floats,
    our_weights: Sequence[float] | Floats | None,
    theirs: Sequence[float] | Floats,
    their_weights: Sequence[float] | Floats | None,
) -> list[Floats]:
    first, second = _checked(ours, our_weights), _checked(theirs, their_weights)
    if first[0].size != second[0].size:
        raise ValueError(f"cannot pair {first[0].size} prompts with {second[0].size}")
    return [*first, *second]


def _interval(
    statistic: Callable[[list[Floats]], Floats],
    columns: list[Floats],
    settings: tuple[float, int, int],
    transform: Callable[[Floats], Floats] | None,
) -> Estimate:
    """Take *statistic* of the columns' sums, once over all prompts and once per resample."""
    level, resamples, seed = settings
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"need 0 < level < 1 and resamples >= 1, got {level} and {resamples}")
    apply = transform if transform is not None else (lambda x: x)
    count = columns[0].size
    mean = float(apply(statistic([np.asarray([c.sum()]) for c in columns]))[0])
    if count == 1:
        return Estimate(mean, mean, mean, 1)
    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, step := max(1, _CHUNK_ELEMENTS // count)):
        draws = rng.integers(0, count, size=(min(step, resamples - start), count))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(apply(statistic([c[draws].sum(axis=1) for c in columns])))
    drawn = np.concatenate(parts)
    # A resample may hold only prompts whose denominator is zero; it says nothing about the rate.
    drawn = drawn[np.isfinite(drawn)]
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), count)
