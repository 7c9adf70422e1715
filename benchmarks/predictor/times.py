"""What a guess costs before the first token: its time, measured in turn with the prompt's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from traffic import Item, Model, mixed, open_model

from melinoe.generate import generate
from melinoe.predictor import fit
from melinoe.stats import bootstrap

REPEATS = 5


def times(model: Model, items: list[Item], slots: int, prompts: int = 32) -> list[dict[str, Any]]:
    """
    Time each way to guess beside the time to the first token of the same prompts.

    One prompt after the other: the first token with *slots* experts resident and the cache empty,
    then every way to guess, each the median of five calls. The first prompt is discarded.
    """
    served, handle, tokenizer = open_model(Path(model.path), slots, policy="lfu")
    every = [one.prompt for one in items]
    predictor = fit(model.read, every, model.embeddings, slots, seed=0)
    predictor.bind(served)
    rows = np.random.default_rng(1).permutation(mixed(items))[: prompts + 1]
    ways: dict[str, Callable[[int], Any]] = {
        "popularity": lambda row: predictor.top((), slots),
        "learned": lambda row: predictor.top(every[row], slots),
    }
    ttft_s: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for row in rows:
        first = []
        for _ in range(3):
            handle.reset_cache()
            first.append(generate(served, handle, tokenizer, every[row], 1).ttft_s)
        ttft_s.append(float(np.median(first)))
        for name, call in ways.items():
            taken[name].append(_median(call, int(row)))
    handle.detach()
    whole = np.array(ttft_s[1:])
    return [
        {
            "model": model.name,
            "way": name,
            "prompts": len(whole),
            "guess_ms": bootstrap(np.array(seconds[1:]) * 1e3).to_dict(),
            "ttft_without_ms": bootstrap(whole * 1e3).to_dict(),
            "share_of_ttft_percent": bootstrap(np.array(seconds[1:]) * 100, whole).to_dict(),
        }
        for name, seconds in taken.items()
    ]


def _median(call: Callable[[int], Any], row: int) -> float:
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call(row)
        found.append(time.perf_counter() - start)
    return float(np.median(found))
