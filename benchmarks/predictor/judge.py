"""Numbers of the study: recall and transfers of guesses, with intervals over documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from guesses import Traffic, lists, recall

from melinoe.cache.counters import COMPLETION
from melinoe.cache.prefetch import Listed
from melinoe.cache.simulator import simulate
from melinoe.predictor.fit import Floats
from melinoe.stats import Estimate, bootstrap, paired_difference

POLICY = "lfu"  # the demo's, the stronger one for base and fine-tuned models

Sums = tuple[Floats, Floats]


def by_document(traffic: Traffic, top: Floats, bottom: Floats | None = None) -> Sums:
    """Sums over the requests of each document: numerators, and denominators (or requests)."""
    names, place = np.unique(traffic.document, return_inverse=True)
    ones = np.ones(len(place)) if bottom is None else bottom
    return (
        np.bincount(place, top, minlength=names.size),
        np.bincount(place, ones, minlength=names.size),
    )


def estimate(sums: Sums) -> dict[str, Any]:
    """Ratio of sums, resampled by document."""
    return bootstrap(sums[0], sums[1]).to_dict()


def difference(ours: Sums, theirs: Sums) -> Estimate:
    """Ours minus theirs, resampled by document, paired."""
    return paired_difference(ours[0], theirs[0], ours[1], theirs[1])


def recalls(traffic: Traffic, guesses: Mapping[str, Floats], slots: int) -> dict[str, Floats]:
    """Of each request, by strategy."""
    return {name: recall(traffic.used, scores, slots) for name, scores in guesses.items()}


def transfers(
    traffic: Traffic, scores: Floats | None, slots: int, cold: bool = True
) -> dict[str, Floats]:
    """
    Simulate one strategy with its prefetch between the prompt and the completion.

    Returns:
        ``demand`` and ``prefetch`` loads of each request's completion and its ``tokens``.
    """
    done = simulate(
        traffic.trace,
        slots,
        POLICY,
        prefetch=None if scores is None else Listed(lists(scores, slots)),
        reset_between_sequences=cold,
    )
    each = done.per_sequence
    return {
        "demand": np.array([one.loads[COMPLETION].sum() for one in each], float),
        "prefetch": np.array([one.prefetch_loads.sum() for one in each], float),
        "tokens": np.array([one.tokens[COMPLETION] for one in each], float),
    }


def loads_per_token(traffic: Traffic, found: Mapping[str, Floats]) -> Sums:
    """Demand and prefetch loads together, per token."""
    return by_document(traffic, found["demand"] + found["prefetch"], found["tokens"])


def best_of(names: Sequence[str], means: Mapping[str, float], lowest: bool = False) -> str:
    """The name with the highest mean, or the lowest."""
    return (min if lowest else max)(names, key=lambda name: means[name])
