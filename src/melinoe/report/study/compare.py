"""Compute what a setting costs over another, and what it saves against the base model."""

from collections.abc import Sequence

import numpy as np

from melinoe.report.schema import Record
from melinoe.report.study.runs import Setting, Study, corpora, pairs
from melinoe.report.study.seeds import Columns, Floats, crossed
from melinoe.stats import Estimate


def increase(setting: Setting, other: Setting | None, in_domain: bool) -> Estimate | None:
    """
    Perplexity over the other's with the same seed, minus 1: 0.02 is 2 % worse.

    Over several texts it is the geometric mean of the factors, every text weighing the same.
    ``None`` without the other or without such texts.
    """
    if other is None:
        return None
    found = pairs(setting, other)
    texts = corpora(found[0][0])[0 if in_domain else 1]
    return _increase(found, texts) if texts else None


def increase_on(setting: Setting, other: Setting | None, text: str) -> Estimate | None:
    """As `increase`, on one text."""
    return None if other is None else _increase(pairs(setting, other), [text])


def _increase(runs: Sequence[tuple[Record, Record]], texts: Sequence[str]) -> Estimate:
    parts = [
        (
            _column([ours for ours, _ in runs], text, "nll"),
            _column([theirs for _, theirs in runs], text, "nll"),
            _column([ours for ours, _ in runs], text, "tokens"),
        )
        for text in texts
    ]

    def statistic(sums: list[Floats]) -> Floats:
        gaps = [(ours - theirs) / tokens for ours, theirs, tokens in sums]
        return np.asarray(np.exp(np.mean(gaps, axis=0)))

    factor = crossed(parts, statistic, positive=True)
    return Estimate(factor.mean - 1, factor.low - 1, factor.high - 1, factor.n)


def transfers(setting: Setting, cache: str) -> Estimate:
    """Transfers per generated token with a cache such as ``lfu-8``, over seeds and prompts."""
    return crossed([_moved(list(setting.runs.values()), cache)], _rate, positive=True)


def fewer(study: Study, setting: Setting, cache: str) -> Estimate | None:
    """
    How many times fewer transfers than the base model, over seeds and prompts.

    ``None`` without a base, or where nothing was transferred, which has no ratio.
    """
    if study.base is None:
        return None
    ours = list(setting.runs.values())
    columns = (*_moved([study.base] * len(ours), cache), *_moved(ours, cache))
    if not np.any(columns[2]):
        return None

    def statistic(sums: list[Floats]) -> Floats:
        base, base_tokens, mine, my_tokens = sums[0]
        return np.asarray((base / base_tokens) / np.maximum(mine / my_tokens, 1e-12))

    return crossed([columns], statistic, positive=True)


def perplexity(setting: Setting, text: str) -> Estimate:
    """Perplexity on one text, over seeds and examples."""
    runs = list(setting.runs.values())
    part = (_column(runs, text, "nll"), _column(runs, text, "tokens"))
    return crossed([part], lambda sums: np.asarray(np.exp(_rate(sums))), positive=True)


def average(setting: Setting, key: str) -> float:
    """Mean of a list that each run holds, over seeds."""
    return float(np.mean([np.nanmean(run[key]) for run in setting.runs.values()]))


def _rate(sums: list[Floats]) -> Floats:
    return np.asarray(sums[0][0] / sums[0][1])


def _column(runs: Sequence[Record], text: str, key: str) -> Floats:
    return np.array([run["quality"][text][key] for run in runs], dtype=np.float64)


def _moved(runs: Sequence[Record], cache: str) -> Columns:
    loads = np.array([run["transfers"][cache]["loads"] for run in runs], dtype=np.float64)
    return loads, np.array([run["tokens"] for run in runs], dtype=np.float64)
