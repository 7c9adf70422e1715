"""
Intervals over seeds and items at once: the crossed percentile bootstrap.

Every seed's model was judged on the same items (examples, documents, prompts), so the measurements
form a table of seeds by items. A resample draws rows and columns, both with replacement: the
interval then holds what another seed and other items of the same kind would have changed. Of few
seeds it holds too little: resampling n of them shows (n - 1)/n of their variance, two thirds of it
with three, and none with one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from melinoe.stats import Estimate

Floats = NDArray[np.float64]
Columns = Sequence[Floats]
LEVEL, RESAMPLES = 0.95, 2000


def crossed(
    parts: Sequence[Columns], statistic: Callable[[list[Floats]], Floats], *, seed: int = 0
) -> Estimate:
    """
    Estimate a statistic of sums, with an interval over seeds and items.

    Args:
        parts: One entry per kind of item (one corpus, say); each is a sequence of arrays, all
            ``(seeds, items)`` of that part; a part's arrays are resampled together. What does not
            depend on the seed is repeated along the first axis.
        statistic: Called with one array ``(arrays, resamples)`` of sums per part; gives one value
            per resample.
        seed: Of the draw.

    Returns:
        Mean and the middle 95 % of 2,000 resamples; ``n`` is the number of seeds.

    Raises:
        ValueError: arrays of one part differ in shape, or parts in their number of seeds.
    """
    stacked = [np.stack([np.asarray(column, float) for column in part]) for part in parts]
    seeds = stacked[0].shape[1]
    if any(part.shape[1] != seeds for part in stacked):
        raise ValueError("every part needs the same seeds")
    mean = float(statistic([part.sum(axis=(1, 2))[:, None] for part in stacked])[0])
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, seeds, size=(RESAMPLES, seeds))
    row_counts = _counts(rows, seeds)
    sums = []
    for part in stacked:
        items = part.shape[2]
        column_counts = _counts(rng.integers(0, items, size=(RESAMPLES, items)), items)
        sums.append(np.einsum("rs,asi,ri->ar", row_counts, part, column_counts, optimize=True))
    drawn = statistic(sums)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high), seeds)


def _counts(draws: NDArray[np.int64], size: int) -> Floats:
    """How often each index was drawn: float64 (resamples, size)."""
    counts = np.zeros((draws.shape[0], size))
    np.add.at(counts, (np.arange(draws.shape[0])[:, None], draws), 1.0)
    return counts
