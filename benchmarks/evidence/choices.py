"""What it costs and saves to let resident experts stand in for missing ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from texts import IN_DOMAIN, Texts

from melinoe.engine.load import load
from melinoe.evaluate import decoded_perplexity, price_of_choice
from melinoe.moe.choice import ChoiceSettings
from melinoe.stats import Estimate

POLICY, QUARTER = "lfu", 8
SETTINGS = (
    ChoiceSettings("cache-prior", 0.1),
    ChoiceSettings("cache-prior", 0.3),
)


def prices(name: str, path: Path, domains: list[Texts], count: int) -> list[dict[str, Any]]:
    """Read *count* texts of each domain, of as many documents, token by token, as each setting."""
    model, handle = load(
        str(path), "cpu", slots=QUARTER, policy=POLICY, dtype=torch.float32, store="ram"
    )
    rows = []
    for of in domains:
        one_each = np.sort(np.unique(of.documents, return_index=True)[1])[:count]
        some = [of.judged[row] for row in one_each]
        exact = decoded_perplexity(model, handle, some)
        for settings in SETTINGS:
            about = {"in_domain": of.domain == IN_DOMAIN}
            record, found = price_of_choice(model, handle, some, settings, name, of.domain, **about)
            perplexity, transfers = (one.change for one in found)
            before, after = record["transfers"].values()
            rows.append(
                {
                    "model": name,
                    "domain": of.domain,
                    "choice": f"{settings.kind} {settings.strength:g}",
                    "perplexity": exact.perplexity.estimate,
                    "its_increase_percent": percent(perplexity),
                    "transfers": before,
                    "with_changed_choices": after,
                    "their_change_percent": percent(transfers),
                }
            )
    handle.detach()
    return rows


def percent(share: Estimate) -> Estimate:
    """A share as a percentage."""
    return Estimate(100 * share.mean, 100 * share.low, 100 * share.high, share.n)
