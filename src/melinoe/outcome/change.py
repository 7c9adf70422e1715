"""After against before or control, paired by example: what fine-tuning bought, and its price."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from melinoe.errors import DataError
from melinoe.evaluate import perplexity_increase
from melinoe.outcome.model import LocalityOf, Measured
from melinoe.stats import Estimate, paired_difference, paired_ratio


def change_of(before: Measured, after: Measured, sizes: Sequence[int]) -> dict[str, Any]:
    """
    After against before, paired by example, text by text and cache by cache.

    Args:
        before: The base model; or the control, for what fine-tuning for locality alone did.
        after: The fine-tuned model.
        sizes: Slots of the caches to compare at.

    Raises:
        DataError: no prompt got a completion from both.
    """
    return {
        "perplexity": {
            name: perplexity_increase(one, before.perplexities[name]).to_dict()
            for name, one in after.perplexities.items()
        },
        **{
            name: {
                "experts_per_sequence": _paired_experts(before.localities[name], one).to_dict(),
                "transfers_per_token": _paired_transfers(before.localities[name], one, sizes),
            }
            for name, one in after.localities.items()
        },
    }


def _paired_transfers(
    before: LocalityOf, after: LocalityOf, sizes: Sequence[int]
) -> dict[str, dict[str, list[Any]]]:
    """Transfers per token before over after, by policy and slots: how many times fewer."""
    transfers: dict[str, dict[str, list[Any]]] = {}
    for policy, by_size in after.counts.items():
        transfers[policy] = {"slots": [], "ratio": []}
        for size in sizes:
            ours, theirs = by_size[size], before.counts[policy][size]
            if not sum(ours["loads"]):  # nothing left to divide by
                continue
            ratio = paired_ratio(theirs["loads"], ours["loads"], theirs["tokens"], ours["tokens"])
            transfers[policy]["slots"].append(size)
            transfers[policy]["ratio"].append(ratio.to_dict())
    return transfers


def _paired_experts(before: LocalityOf, after: LocalityOf) -> Estimate:
    """Difference in experts per sequence, over the prompts that both models answered."""
    both = ~(np.isnan(before.experts) | np.isnan(after.experts))
    if not both.any():
        raise DataError("no prompt got a completion from both models; measure on other prompts")
    return paired_difference(after.experts[both], before.experts[both])
