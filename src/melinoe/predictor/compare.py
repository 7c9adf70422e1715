"""Compare the learned predictor with rivals that cost nothing, on prompts none has seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from melinoe.cache import DEFAULT_POLICY
from melinoe.cache.counters import COMPLETION
from melinoe.cache.prefetch import Listed, Prefetcher, most_wanted
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.errors import DataError
from melinoe.predictor.fit import (
    FitSettings,
    Floats,
    completion_shares,
    fit_shares,
    recall_at,
    same_prompts,
    usable,
)
from melinoe.predictor.model import features_of
from melinoe.stats import Estimate, bootstrap, paired_difference

RIVALS = ("empty", "popularity", "prefill")  # strategies that cost nothing
NAMED = ("popularity", "prefill", "learned")  # strategies that load anything


@dataclass(frozen=True)
class Comparison:
    """Each way to fill the cache before the completion, the `RIVALS` and ``learned``, by name."""

    slots: int  # of each layer
    recall: Mapping[str, Estimate]  # at so many slots, over prompts
    ceiling: Estimate  # the best that unchanging experts could reach on each prompt
    gain: Estimate  # recall of the learned predictor minus that of the best rival, paired
    # Loads per token of the completion, the prefetch's too; and less than an empty start's, paired.
    transfers: Mapping[str, Estimate] = field(default_factory=dict)
    saved: Mapping[str, Estimate] = field(default_factory=dict)

    @property
    def winner(self) -> str:
        """The best guess: learned only if the whole interval of its gain is above 0."""
        rival = max(RIVALS, key=lambda name: self.recall[name].mean)
        return "learned" if self.gain.low > 0 else rival

    @property
    def prefetch(self) -> str:
        """The strategy to load ahead by: the winner, if that saves transfers; else ``none``."""
        saved = self.saved.get(self.winner)
        return self.winner if saved is not None and saved.low > 0 else "none"

    def to_record(self, model: str) -> dict[str, Any]:
        """Return the record of kind ``predictor`` that reports read."""
        found: dict[str, Any] = {"kind": "predictor", "model": model, "slots": self.slots}
        found |= {"ceiling": self.ceiling.to_dict(), "gain": self.gain.to_dict()}
        found |= {"winner": self.winner, "prefetch": self.prefetch}
        for what in ("recall", "transfers", "saved"):
            estimates = getattr(self, what).items()
            found[what] = {name: one.to_dict() for name, one in estimates} or None
        return found


def compare(
    trace: Trace,
    prompts: Sequence[Sequence[int]],
    embeddings: torch.Tensor,
    slots: int,
    seed: int = 0,
    folds: int = 5,
    settings: FitSettings | None = None,
    policy: str = DEFAULT_POLICY,
) -> Comparison:
    """
    Measure the learned predictor and its rivals by cross-validation: recall, and what they save.

    Every prompt is judged by a predictor, and a popularity, that never saw it; equal prompts fall
    into one of the *folds*. ``prefill`` is the experts that the prompt's own forward pass used
    most, ties and gaps filled by popularity. Transfers are simulated under *policy*, each sequence
    from a cold cache. Other arguments as in `fit`.
    """
    target, prefill = completion_shares(trace, prompts)
    kept = usable(target, prompts)
    features = features_of(embeddings, [prompts[index] for index in kept])  # once for all folds
    group = same_prompts([prompts[index] for index in kept])
    distinct = int(group.max()) + 1
    fold_of = np.random.default_rng(seed).permutation(distinct)[group] % folds
    found = {name: np.zeros(kept.size) for name in (*RIVALS, "learned", "ceiling")}
    named: dict[str, dict[int, list[list[int]]]] = {name: {} for name in NAMED}
    for fold in range(folds):
        rows = fold_of == fold
        test, train = kept[rows], kept[~rows]
        if test.size == 0:
            raise DataError(
                f"{distinct} different prompts cannot be cut into {folds} folds; trace more"
            )
        predictor = fit_shares(
            target[train],
            [prompts[index] for index in train],
            embeddings,
            slots,
            trace.fingerprint,
            seed,
            settings,
            features[~rows],
        )
        popularity = np.broadcast_to(target[train].mean(axis=0), target[test].shape)
        guesses = {
            "popularity": popularity,
            # A use of the prompt outweighs any difference in popularity, which only breaks ties.
            "prefill": prefill[test] + popularity * 1e-6,
            "learned": predictor.distributions(features[rows]),
        }
        found["ceiling"][rows] = recall_at(target[test], target[test], slots)
        for name, scores in guesses.items():
            found[name][rows] = recall_at(target[test], scores, slots)
            # Of a layer with fewer experts than others, only those that it has.
            exists = [predictor.popularity > 0] * len(test) if name == "learned" else scores > 0
            for index, one, known in zip(test.tolist(), scores, exists, strict=True):
                named[name][index] = most_wanted(one, slots, known)
    best = max(RIVALS, key=lambda name: float(found[name].mean()))
    loads, tokens = _loads(trace, None, slots, policy)
    others = {name: _loads(trace, Listed(named[name]), slots, policy)[0] for name in NAMED}
    return Comparison(
        slots,
        {name: bootstrap(found[name]) for name in (*RIVALS, "learned")},
        bootstrap(found["ceiling"]),
        paired_difference(found["learned"], found[best]),
        {name: bootstrap(one, tokens) for name, one in {"empty": loads, **others}.items()},
        {name: paired_difference(loads, one, tokens, tokens) for name, one in others.items()},
    )


def _loads(
    trace: Trace, prefetch: Prefetcher | None, slots: int, policy: str
) -> tuple[Floats, Floats]:
    """Loads of each unit's completion, its prefetch included, and its tokens."""
    done = simulate(trace, slots, policy, prefetch=prefetch, reset_between_sequences=True)
    each = [
        (one.loads[COMPLETION].sum() + one.prefetch_loads.sum(), one.tokens[COMPLETION])
        for one in done.per_sequence
    ]
    loads, tokens = np.array(each, np.float64).T
    return loads, tokens
