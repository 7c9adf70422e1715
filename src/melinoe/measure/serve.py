"""Serve prompts one by one under one configuration; count and time, with intervals."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.prefetch import Prefetcher
from melinoe.engine.handle import Handle
from melinoe.errors import DataError
from melinoe.generate import Generation, Prompt, generate
from melinoe.measure.machine import machine
from melinoe.stats import bootstrap

Serving = Generator[None, None, dict[str, Any]]

# Estimate: (numerator, denominator) per prompt, so that each is a ratio of sums over prompts.
# Uses, hits, loads and stalls are the completion's; see `serving`.
_ESTIMATES: dict[str, tuple[str, str | None]] = {
    "hit_rate": ("hits", "uses"),
    "adjusted_hit_rate": ("uses_not_paid", "uses"),
    "zero_miss_tokens": ("zero_miss", "tokens"),
    "transfers_per_token": ("loads", "tokens"),
    "prefetch_transfers_per_token": ("prefetch_loads", "tokens"),
    "computed_there_per_token": ("elsewhere", "tokens"),
    "prefill_transfers": ("prefill_loads", None),
    "tokens_per_s": ("new_tokens", "seconds"),
    "tpot_s": ("decode_s", "tokens"),
    "ttft_s": ("ttft_s", None),
    "stall_ms_per_token": ("stall_ms", "tokens"),
}


def serving(
    model: Any,
    handle: Handle,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    *,
    prefetch: Prefetcher | None = None,
    label: str,
    strategy: str = "",
    cold: bool = True,
) -> Serving:
    """
    Generate greedily from each prompt, pausing after each; return a record of kind ``serve``.

    A generator for `serve` or `side_by_side` to drive; nothing is checked or run before that. The
    first prompt is run once before anything is measured. Counts and times are of the completion's
    forward passes, one token each, unless their name says else; ``docs/method.md`` defines each.
    Each is a ratio of sums with a 95 % interval over prompts.

    Args:
        model: As in `melinoe.generate.generate`, as is *prefetch*.
        max_new_tokens: At most so many for each; at least 2.
        label: The model's name in tables; *strategy* is the strategy's.
        cold: Empty the cache before each prompt; else it keeps what the one before left.

    Raises:
        DataError: no prompts, or none that got two tokens.
    """
    if max_new_tokens < 2:
        raise ValueError("serving needs max_new_tokens >= 2")
    if not prompts:
        raise DataError("there are no prompts to serve; give at least one")

    def run(prompt: Prompt) -> Generation:
        if cold:
            handle.reset_cache()
        return generate(model, handle, tokenizer, prompt, max_new_tokens, prefetch=prefetch)

    run(prompts[0])
    handle.reset_cache()
    generations = []
    for prompt in prompts:
        generations.append(run(prompt))
        yield
    counted = [one.counters for one in generations if one.counters]
    uses, requests = (
        sum(int(getattr(one, name)[COMPLETION].sum()) for one in counted)
        for name in ("uses", "requests")
    )
    link = handle.link
    return serve_record(
        generations,
        kind="serve",
        model=label,
        strategy=strategy or (handle.policy if prefetch is None else f"{handle.policy}, prefetch"),
        prefetch="none" if prefetch is None else prefetch.name,
        slots=handle.slots,
        num_experts=handle.layers[0].num_experts,
        top_k=round(uses / requests) if requests else None,
        layers=len(handle.layers),
        block_bytes=[handle.store.block_bytes(layer) for layer in range(len(handle.layers))],
        policy=handle.policy,
        miss=handle.misses.kind,
        miss_figures=None if handle.misses.machine is None else handle.misses.to_dict(),
        store=handle.store.kind,
        expert_memory_bytes=handle.expert_memory_bytes,
        link=link
        and {
            "bandwidth_gb_s": link.bandwidth_bytes_per_s / 1e9,
            "latency_us": link.latency_s * 1e6,
            "emulated": True,
        },
        cold=cold,
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
    )


def serve(*arguments: Any, **options: Any) -> dict[str, Any]:
    """Run one `serving`, whose arguments these are, to its end, and return its record."""
    return side_by_side([serving(*arguments, **options)])[0]


def side_by_side(servings: Sequence[Serving]) -> list[dict[str, Any]]:
    """
    Run several servings prompt by prompt in turn, and return their records.

    Throttling and other work of the machine then fall on all of them alike.
    """
    records: list[dict[str, Any]] = [{} for _ in servings]
    running = list(range(len(servings)))
    while running:
        running = running[1:] + running[:1]
        for index in list(running):
            try:
                next(servings[index])
            except StopIteration as stop:
                records[index] = stop.value
                running.remove(index)
    return records


def serve_record(generations: Sequence[Generation], **facts: Any) -> dict[str, Any]:
    """Turn what `generate` returned, one run for each prompt, into *facts* with estimates."""
    rows = [_row(one) for one in generations]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if sum(columns["tokens"]) == 0:
        raise DataError(
            "no prompt got a second token, so nothing was decoded; check the prompts' ends"
        )
    estimates = {
        name: bootstrap(columns[top], columns[bottom] if bottom else None).to_dict()
        for name, (top, bottom) in _ESTIMATES.items()
    }
    return {**facts, **estimates, "per_prompt": columns, "machine": machine()}


def _row(one: Generation) -> dict[str, float]:
    counters = one.counters
    if counters is None:
        raise ValueError("a plain model has no cache to count; attach the runtime first")

    def count(name: str, kind: int = COMPLETION) -> int:
        return int(np.sum(getattr(counters, name)[kind]))

    uses, loads, on_host = count("uses"), count("loads"), count("on_host")
    prefetches = int(counters.prefetch_loads.sum())
    return {
        "prompt_tokens": len(one.prompt_ids),
        "new_tokens": len(one.ids),
        "tokens": count("tokens"),
        "uses": uses,
        "hits": count("hits"),
        "loads": loads,
        "prefetch_loads": prefetches,
        "elsewhere": on_host,
        "uses_not_paid": uses - loads - prefetches - on_host,
        "prefill_loads": count("loads", PROMPT),
        "zero_miss": count("zero_miss_tokens"),
        "seconds": one.seconds,
        "ttft_s": one.ttft_s,
        "decode_s": one.seconds - one.ttft_s,
        "stall_ms": 1e3 * one.stall_s,
    }
