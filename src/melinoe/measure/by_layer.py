"""The hit rate of each MoE layer, where the misses come from."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION, Counters
from melinoe.stats import bootstrap


def hit_rates_by_layer(counters: Iterable[Counters]) -> list[dict[str, Any] | None]:
    """
    Return an estimate over *counters*, one of each sequence, for each layer; of completions.

    None stands for a layer that served no token: of a model with two stacks one may never run.
    """
    listed = list(counters)
    hits = np.array([one.hits[COMPLETION] for one in listed])
    uses = np.array([one.uses[COMPLETION] for one in listed])
    return [
        bootstrap(hits[:, layer], uses[:, layer]).to_dict() if uses[:, layer].any() else None
        for layer in range(uses.shape[1])
    ]
