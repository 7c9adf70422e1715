"""
What each strategy would load before the completion, for every request of some traffic.

A guess is an array of scores ``(requests, layers, experts)``; only experts with a score above 0
are named, the highest first. What learns is judged on documents that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from traffic import Item, Model

from melinoe.cache.trace import Trace
from melinoe.predictor.fit import Floats, completion_shares, fit_shares, top_ids
from melinoe.predictor.model import features_of

FOLDS = 5
RIVALS = ("popularity", "prefill")  # what costs nothing, beside an empty start


@dataclass
class Traffic:
    """
    Requests in the order in which they come, with what they used.

    Attributes:
        prompts: Token ids.
        source: Of each request; also its user.
        document: int64, a number for each document; intervals are over those.
        used: Shares of use of the completion ``(requests, layers, experts)``.
        own: Shares of use of the prompt.
        trace: One sequence a request, in the same order.
        folds: int64; requests of one document are in one fold.
    """

    model: Model
    prompts: list[list[int]]
    source: list[str]
    document: np.ndarray
    used: Floats
    own: Floats
    trace: Trace
    folds: np.ndarray


def traffic_of(model: Model, trace: Trace, items: Sequence[Item], seed: int = 0) -> Traffic:
    """Make traffic of a trace and the items that it is of, in their order."""
    prompts = [one.prompt for one in items]
    used, own = completion_shares(trace, prompts)
    names: dict[tuple[str, int], int] = {}
    document = np.array([names.setdefault((one.source, one.document), len(names)) for one in items])
    folds = np.random.default_rng(seed).permutation(len(names))[document] % FOLDS
    return Traffic(model, prompts, [one.source for one in items], document, used, own, trace, folds)


def learned(traffic: Traffic, slots: int, seed: int = 0) -> dict[str, Floats]:
    """``popularity`` and ``learned``, each fitted to the other folds' documents."""
    model, found = traffic.model, {}
    features = features_of(model.embeddings, traffic.prompts)
    shape = traffic.used.shape
    for name in ("popularity", "learned"):
        found[name] = np.zeros(shape)
    for fold in range(FOLDS):
        test, train = np.flatnonzero(traffic.folds == fold), np.flatnonzero(traffic.folds != fold)
        predictor = fit_shares(
            traffic.used[train],
            [traffic.prompts[k] for k in train],
            model.embeddings,
            slots,
            model.fingerprint,
            seed,
            features=features[torch.from_numpy(train)],
            groups=traffic.document[train],
        )
        found["popularity"][test] = traffic.used[train].mean(axis=0)
        found["learned"][test] = predictor.distributions(features[torch.from_numpy(test)])
    return found


def recall(used: Floats, scores: Floats, slots: int) -> Floats:
    """Share of the uses that those named would have served; ``(requests,)``, mean over layers."""
    chosen = top_ids(scores, slots)
    named = np.take_along_axis(scores, chosen, axis=-1) > 0
    return (np.take_along_axis(used, chosen, axis=-1) * named).sum(axis=-1).mean(axis=-1)


def lists(scores: Floats, slots: int) -> dict[int, list[list[int]]]:
    """What the simulator prefetches: sequence to layer to ids."""
    best = top_ids(scores, slots)
    return {
        row: [[int(e) for e in ids if scores[row, layer, e] > 0] for layer, ids in enumerate(one)]
        for row, one in enumerate(best)
    }
