"""
Run the strategies for real, in turn, and set what the simulator predicted beside what was measured.

    1. open a runtime for each cache (slots, policy); those with every expert resident come first
    2. trace the prompts once, all experts resident: what the model chooses does not depend on slots
    3. simulate every strategy on that trace
    4. serve all strategies side by side, prompt by prompt, in one process
    5. compare: counts prompt by prompt, which must be equal; seconds, whose error is stated
    6. serve the first prompt once more by the first strategy, token by token, for a timeline

A runtime holds its own backbone and slots; experts in RAM are held once, for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from melinoe.cache.prefetch import Given, Prefetcher
from melinoe.engine.misses import time_read
from melinoe.generate import prompt_ids, trace_prompts
from melinoe.measure import machine, serving, side_by_side, timeline_record
from melinoe.plan.predicted import (
    COUNTS,
    counts_of,
    machine_of,
    replay,
    seconds_of,
    work_of,
)
from melinoe.plan.runtimes import Runtimes, Setting, open_runtimes
from melinoe.plan.strategies import Strategy, prefetcher_of
from melinoe.stats import bootstrap

Say = Callable[[str], None]
_OF_PREFETCHES = ("prefetch_precision", "prefetch_recall")


def bench(
    setting: Setting,
    chosen: Sequence[Strategy],
    prompts: Sequence[Any],
    given: Given | None = None,
    *,
    label: str,
    say: Say = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """
    Serve *prompts* by every strategy, and compare with the simulator.

    Args:
        setting: What all have in common.
        chosen: From `strategies`; for each engine one of them holds every expert.
        prompts: Texts or token ids.
        given: What their prefetches are made of.
        label: The model's name in tables.
        say: Told of progress.

    Returns:
        The records of kind ``serve``, in the order of *chosen*, each with ``predicted``; one of
        kind ``timeline``; and a benchmark record with a row for each strategy.

    Raises:
        BudgetError, MelinoeError: as `open_runtimes`; or what a prefetch is made of is missing.
        DataError: no prompts, or none that got a second token.
    """
    ahead = [prefetcher_of(one, given) for one in chosen]  # refused before anything is read
    runtimes = open_runtimes(setting, chosen)
    resident = {one.engine: one for one in chosen if one.warm}
    model, handle = runtimes[next(iter(resident.values()))]
    say(f"tracing {len(prompts)} prompts with every expert resident")
    guesses = any(one is not None and one.uses_guesses for one in ahead)
    trace = trace_prompts(
        model, handle, runtimes.tokenizer, prompts, setting.max_new_tokens, guesses=guesses
    )
    ids = [prompt_ids(runtimes.tokenizer, one) for one in prompts]
    say("timing the store")
    read_s = time_read(handle.layers, handle.store, torch.device(model.device))

    servings, replays = [], []
    for strategy, prefetch in zip(chosen, ahead, strict=True):
        model, handle = runtimes[strategy]
        if prefetch is not None:
            prefetch.bind(model, runtimes.tokenizer)
        replays.append(replay(trace, strategy, prefetch, ids, handle))
        servings.append(
            serving(
                model,
                handle,
                runtimes.tokenizer,
                prompts,
                setting.max_new_tokens,
                prefetch=prefetch,
                label=label,
                strategy=strategy.name,
                cold=not strategy.warm,
                repeat=1 if strategy.warm else setting.repeat,
                progress=None,
            )
        )
    say(f"serving {len(prompts)} prompts by {len(chosen)} strategies in turn")
    records = side_by_side(servings)
    rows = []
    for strategy, record, done in zip(chosen, records, replays, strict=True):
        _, handle = runtimes[strategy]
        measured = records[list(chosen).index(resident[strategy.engine])]["per_prompt"]
        figures, work = machine_of(handle, read_s, measured), work_of(handle)
        record["engine"] = strategy.engine
        record["predicted"] = _predicted(record, counts_of(done), seconds_of(done, figures, work))
        rows.append(_row(strategy, record))
    say("serving one prompt token by token")
    moments = _timeline(runtimes, chosen, ahead, prompts[0], setting, label)
    return records, moments, _benchmark(rows, setting, read_s, label, len(prompts))


def _timeline(
    runtimes: Runtimes,
    chosen: Sequence[Strategy],
    ahead: Sequence[Prefetcher | None],
    prompt: Any,
    setting: Setting,
    label: str,
) -> dict[str, Any]:
    """One generation by the first strategy between the two extremes."""
    between = [one for one in zip(chosen, ahead, strict=True) if one[0].between_extremes]
    strategy, prefetch = (between or [(chosen[0], ahead[0])])[0]
    model, handle = runtimes[strategy]
    return timeline_record(
        model, handle, runtimes.tokenizer, prompt, setting.max_new_tokens,
        label=f"{label}, {strategy.name}", prefetch=prefetch,
    )  # fmt: skip


def _predicted(
    record: Mapping[str, Any],
    counts: Mapping[str, list[int]],
    seconds: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Counts and seconds by the simulator, and how far both are from what was measured."""
    measured = record["per_prompt"]
    wrong = [name for name in COUNTS if [int(v) for v in measured[name]] != counts[name]]
    ttft_s, decode_s = seconds
    tpot_s = float(decode_s.sum() / sum(counts["tokens"]))
    return {
        "counts": dict(counts),
        "counts_equal": not wrong,
        "counts_that_differ": wrong,
        "tpot_s": tpot_s,
        "ttft_s": float(ttft_s.mean()),
        "tpot_error": tpot_s / record["tpot_s"]["mean"] - 1,
        "ttft_error": float(ttft_s.mean()) / record["ttft_s"]["mean"] - 1,
        "tpot_ratio": bootstrap(decode_s, np.array(measured["decode_s"])).to_dict(),
    }


def _row(strategy: Strategy, record: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    predicted = record["predicted"]
    tokens = sum(predicted["counts"]["tokens"])
    measured = record["tpot_s"]
    return {
        "strategy": strategy.name,
        "slots": strategy.slots,
        "hit_rate": record["hit_rate"]["mean"],
        "transfers_per_token_predicted": sum(predicted["counts"]["loads"]) / tokens,
        "transfers_per_token_measured": record["transfers_per_token"]["mean"],
        "computed_there_per_token": record["computed_there_per_token"]["mean"],
        "adjusted_hit_rate": record["adjusted_hit_rate"]["mean"],
        **{name: (record.get(name) or {}).get("mean") for name in _OF_PREFETCHES},
        "counts_equal": predicted["counts_equal"],
        "predicted_ms": 1e3 * predicted["tpot_s"],
        "measured_ms": {key: 1e3 * measured[key] for key in ("mean", "low", "high")}
        | {"n": measured["n"]},
        "error_percent": 100 * predicted["tpot_error"],
    }


def _benchmark(
    rows: list[dict[str, Any]],
    setting: Setting,
    read_s: float,
    label: str,
    prompts: int,
) -> dict[str, Any]:
    """The record that `melinoe report` shows as a table; what no strategy does has no column."""
    if not any(row["computed_there_per_token"] for row in rows):
        rows = [{**row, "computed_there_per_token": None} for row in rows]
    link = (
        "the machine's own link"
        if setting.link is None
        else f"an emulated link of {setting.link[0] / 1e9:g} GB/s, {setting.link[1] * 1e6:g} us"
    )
    return {
        "benchmark": "bench",
        "title": "Predicted and measured",
        "result": rows,
        "settings": {"model": label, "prompts": prompts, "max_new_tokens": setting.max_new_tokens},
        "notes": [
            f"{label}: {prompts} prompts, {setting.max_new_tokens} new tokens each, all strategies "
            f"in turn in one process, over {link}. Times are per token after the first.",
            f"Reading one expert took {1e3 * read_s:.3f} ms alone. Computing is "
            "taken from the run with every expert resident, so its own time is no prediction.",
            "What a miss costs the engine beside its transfer is not predicted: requests computed "
            "in pieces, and caches that a wait left cold.",
        ],
        "machine": machine(),
    }
