"""
What a prior buys where traffic drifts, and where users are mixed.

Drifting: blocks of requests from one source each, all sources twice. A predictor that was fitted
to GSM8K alone meets six kinds of text it never saw; one that was fitted to all of them (other
documents, cross-validated) is what a deployment could have had, had it known its traffic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from guesses import Traffic, adaptive, learned, recall, traffic_of
from judge import by_document, difference, estimate, loads_per_token, part, transfers
from traffic import MATHS, MIXED_QUESTIONS, Item, Model, in_order, mixed

from melinoe.predictor.features import features_of
from melinoe.predictor.fit import fit_shares
from melinoe.predictor.targets import Floats, completion_shares

FIRST = 4  # requests after a switch that are also shown apart


def blocks(items: Sequence[Item], rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """
    Rows source by source, once for each piece of their documents.

    Returns:
        The order, and the places in it at which another source begins.
    """
    order: list[int] = []
    starts: list[int] = []
    sources = list(dict.fromkeys(items[row].source for row in rows))
    for turn in (0, 1):
        for source in sources:
            own = [
                row
                for row in rows
                if items[row].source == source
                # Half of the questions come in each turn: they have one piece.
                and (items[row].document % 2 if source == MATHS else items[row].piece) == turn
            ]
            if own:
                starts.append(len(order))
                order.extend(own)
    return order, starts


def drifting(model: Model, items: Sequence[Item], slots: int) -> list[dict[str, Any]]:
    """One row a way to serve the drifting traffic, and the users."""
    rows = mixed(items)
    order, starts = blocks(items, rows)
    blocked = traffic_of(model, in_order(model.read, order), [items[k] for k in order])
    shuffled = list(np.random.default_rng(0).permutation(rows))
    users = traffic_of(model, in_order(model.read, shuffled), [items[k] for k in shuffled])
    narrow = _narrow(model, items, slots)
    out = []
    for row in (*_drift(blocked, starts, narrow, slots), *_users(users, narrow, slots)):
        out.append({"model": model.name, **row})
    return out


def _narrow(model: Model, items: Sequence[Item], slots: int) -> Any:
    """A predictor fitted to GSM8K alone, on questions that the traffic does not ask."""
    rows = [
        k for k, one in enumerate(items) if one.source == MATHS and one.document >= MIXED_QUESTIONS
    ]
    prompts = [one.prompt for one in items]
    used, _ = completion_shares(model.read, prompts)
    return fit_shares(
        used[rows], [prompts[k] for k in rows], model.embeddings, slots, model.fingerprint, seed=0
    )


def _predicted(predictor: Any, traffic: Traffic) -> Floats:
    return predictor.distributions(features_of(predictor.embeddings, traffic.prompts))


def _drift(
    traffic: Traffic, starts: Sequence[int], narrow: Any, slots: int
) -> Iterator[dict[str, Any]]:
    base, popularity = _predicted(narrow, traffic), narrow.popularity.astype(float)
    broad = learned(traffic, slots)
    flat = np.broadcast_to(popularity, base.shape)
    ways: dict[str, tuple[Floats | None, str | None]] = {
        "nothing loaded ahead": (None, None),
        "popularity of GSM8K": (flat, None),
        "prefill": (traffic.own, None),
        "prior alone": (adaptive(traffic), "popularity of GSM8K"),
        "predictor of GSM8K": (base, None),
        "predictor of all sources": (broad["learned"], None),
    }
    yield from _rows("drifting", traffic, ways, slots, starts)


def _users(traffic: Traffic, narrow: Any, slots: int) -> Iterator[dict[str, Any]]:
    base = _predicted(narrow, traffic)
    broad, who = learned(traffic, slots), traffic.source
    ways: dict[str, tuple[Floats | None, str | None]] = {
        "nothing loaded ahead": (None, None),
        "predictor of GSM8K": (base, None),
        "prior of all alone": (adaptive(traffic), None),
        "prior of each user alone": (adaptive(traffic, who), "prior of all alone"),
        "predictor of all sources": (broad["learned"], None),
    }
    yield from _rows("seven users, shuffled", traffic, ways, slots, ())


def _rows(
    name: str,
    traffic: Traffic,
    ways: dict[str, tuple[Floats | None, str | None]],
    slots: int,
    starts: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Recall over all and right after switches, loads in a cache that stays warm, and gains."""
    # At the very first request nobody can have learned; a switch is between two sources.
    soon = np.array([s + k for s in starts[1:] for k in range(FIRST)], dtype=int)
    found = {}
    for way, (scores, _) in ways.items():
        share = np.zeros(len(traffic.prompts)) if scores is None else recall(
            traffic.used, scores, slots
        )  # fmt: skip
        loads = loads_per_token(traffic, transfers(traffic, scores, slots, cold=False))
        found[way] = (share, loads)
    for way, (_, against) in ways.items():
        share, loads = found[way]
        row: dict[str, Any] = {
            "traffic": name,
            "way": way,
            "recall": estimate(by_document(traffic, share)),
        }
        if len(soon):
            row["recall_of_the_first_four_after_a_switch"] = estimate(
                part(traffic, (share, None), soon)
            )
        row["loads_per_token"] = estimate(loads)
        row["against"] = against
        if against is not None:
            other, other_loads = found[against]
            row["recall_gained"] = difference(
                by_document(traffic, share), by_document(traffic, other)
            ).to_dict()
            row["loads_per_token_saved"] = difference(other_loads, loads).to_dict()
        yield row
