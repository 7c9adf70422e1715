"""
Intervals over seeds and items at once.

Every seed's model was judged on the same items (examples, documents, prompts), so the measurements
form a table of seeds by items. Items are many: they are resampled, all seeds together. Seeds are
few, and resampling n of them would show (n - 1)/n of their variance; so to each resample is added
what the mean over seeds may be off by, their standard error times a draw of Student's t with n - 1
degrees of freedom. With one seed there is none: the interval then holds items alone.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from melinoe.stats import Estimate

Floats = NDArray[np.float64]
Columns = Sequence[Floats]
LEVEL, RESAMPLES, DRAWS_EACH = 0.95, 2000, 10


def crossed(
    parts: Sequence[Columns],
    statistic: Callable[[list[Floats]], Floats],
    *,
    positive: bool = False,
    seed: int = 0,
) -> Estimate:
    """
    Estimate a statistic of sums, with an interval over seeds and items.

    Args:
        parts: One entry per kind of item (one corpus, say); each is a sequence of arrays, all
            ``(seeds, items)`` of that part; a part's arrays are resampled together. What does not
            depend on the seed is repeated along the first axis.
        statistic: Called with one array ``(arrays, resamples)`` of sums per part; gives one value
            per resample.
        positive: The statistic is above 0, such as a ratio: seeds are taken to differ by factors.
        seed: Of the draw.

    Returns:
        Mean and the middle 95 % of 20,000 draws; ``n`` is the number of seeds.

    Raises:
        ValueError: arrays of one part differ in shape, or parts in their number of seeds.
    """
    stacked = [np.stack([np.asarray(column, float) for column in part]) for part in parts]
    seeds = stacked[0].shape[1]
    if any(part.shape[1] != seeds for part in stacked):
        raise ValueError("every part needs the same seeds")
    mean = float(statistic([part.sum(axis=(1, 2))[:, None] for part in stacked])[0])
    rng = np.random.default_rng(seed)
    sums, by_seed = [], []
    for part in stacked:
        counts = _counts(rng.integers(0, part.shape[2], size=(RESAMPLES, part.shape[2])), part)
        sums.append(np.einsum("asi,ri->ar", part, counts, optimize=True))
        by_seed.append(part.sum(axis=2))

    def log(values: Floats) -> Floats:
        return np.asarray(np.log(np.maximum(values, 1e-12)))  # a cache may have loaded nothing

    to, back = (log, np.exp) if positive else (np.asarray, np.asarray)
    drawn = np.repeat(to(statistic(sums)), DRAWS_EACH)
    if seeds > 1:
        error = float(np.std(to(statistic(by_seed)), ddof=1)) / seeds**0.5
        drawn = drawn + error * rng.standard_t(seeds - 1, size=drawn.size)
    low, high = back(np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Estimate(mean, float(low), float(high), seeds)


def _counts(draws: NDArray[np.int64], part: Floats) -> Floats:
    """How often each item was drawn: float64 (resamples, items)."""
    counts = np.zeros((draws.shape[0], part.shape[2]))
    np.add.at(counts, (np.arange(draws.shape[0])[:, None], draws), 1.0)
    return counts
