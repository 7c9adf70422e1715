"""Every policy, prefetch and number of slots on what was read, from cold caches, and allocation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from texts import Seen

from melinoe.cache.counters import COMPLETION
from melinoe.cache.curves import allocate, miss_curves
from melinoe.cache.locality import popularity
from melinoe.cache.prefetch import prefetcher
from melinoe.cache.simulator import Simulation, simulate
from melinoe.stats import Estimate, bootstrap, paired_difference, paired_ratio

POLICIES = ("lru", "lfu", "static", "belady")
PREFETCHES = ("none", "popularity", "prefill", "predictor")
COMPILED = ("lru", "lfu", "static", "belady")  # equal counts, and far faster
FIGURES = ("tokens", "uses", "hits", "loads", "ahead")

Sums = dict[str, np.ndarray]
Cells = dict[tuple[int, str, str], Sums]


def sums(done: Simulation, documents: np.ndarray) -> Sums:
    """By document: what the ratios are made of; of completions, prefetches in full."""
    rows = [
        (
            one.tokens[COMPLETION],
            one.uses[COMPLETION].sum(),
            one.hits[COMPLETION].sum(),
            one.loads[COMPLETION].sum(),
            one.prefetch_loads.sum(),
        )
        for one in done.per_sequence
    ]
    columns = zip(FIGURES, np.array(rows, float).T, strict=True)
    found = {name: np.bincount(documents, column) for name, column in columns}
    return {**found, "copies": found["loads"] + found["ahead"]}


def replay(seen: Seen, slots: int | Sequence[int], policy: str, prefetch: Any = None) -> Sums:
    """One cell; what ``static`` keeps is counted on the texts to learn from."""
    options = {"popularity": popularity(seen.learned_from)} if policy == "static" else None
    able = policy in COMPILED and prefetch is None
    done = simulate(
        seen.judged,
        slots,
        policy,
        prefetch=prefetch,
        prompts=seen.prompts,
        reset_between_sequences=True,
        policy_options=options,
        engine="compiled" if able else "auto",
    )
    return sums(done, seen.documents)


def table(seen: Seen, model: Any, tokenizer: Any, slots: Sequence[int]) -> Cells:
    """All cells of one model in one domain."""
    cells: Cells = {}
    for size in slots:
        given = seen.given(size)
        for name in PREFETCHES:
            chosen = prefetcher(name, given)
            if chosen is not None:
                chosen.bind(model, tokenizer)
            for policy in POLICIES:
                cells[size, policy, name] = replay(seen, size, policy, chosen)
    return cells


def sizes(cells: Cells) -> list[int]:
    """The numbers of slots that were replayed."""
    return sorted({slots for slots, _, _ in cells})


def rate(found: Sums, top: str = "copies", bottom: str = "tokens") -> Estimate:
    """A ratio of sums over documents."""
    return bootstrap(found[top], found[bottom])


def minus(ours: Sums, theirs: Sums, what: str = "copies") -> Estimate:
    """Ours less theirs per token, paired by document."""
    return paired_difference(ours[what], theirs[what], ours["tokens"], theirs["tokens"])


def times(ours: Sums, theirs: Sums) -> Estimate:
    """Our copies over theirs, paired by document."""
    return paired_ratio(ours["copies"], theirs["copies"])


def allocations(seen: Seen, slots: Sequence[int]) -> list[dict[str, Any]]:
    """
    Slots given to layers by the miss curves of other texts, against as many for each.

    Every layer keeps as many slots as a token has choices; where that is all there is, nothing can
    be moved and no row is made.
    """
    rows = []
    least = seen.judged.top_k
    for policy in ("lru", "lfu"):
        curves = miss_curves(seen.learned_from, policy, reset_between_sequences=True)
        for size in (one for one in slots if one > least):
            budget = size * seen.judged.num_layers
            split = allocate(curves[COMPLETION], budget, at_least=least)
            even, given = replay(seen, size, policy), replay(seen, split, policy)
            rows.append(
                {
                    "model": seen.model,
                    "domain": seen.domain,
                    "slots": size,
                    "policy": policy,
                    "allocated": split,
                    "transfers, uniform": rate(even),
                    "transfers, allocated": rate(given),
                    "difference": minus(given, even),
                }
            )
    return rows
