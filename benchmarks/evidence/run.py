"""
Policies x prefetch x slots, base and fine-tuned, in and out of domain: the evidence in one run.

Questions: which policy, which prefetch, how far from Belady, what slots by layer buy, what
cache-aware choice costs. The answers that would be bad news: a policy that wins in one table and
loses in the next; no prefetch with fewer copies than none; Belady far below all others; nothing
saved by an allocation; perplexity that rises as fast as transfers fall.

Floor: Belady on demand, which no policy that loads on demand can beat, for requests that fit.

Every model reads the same held-out text (`texts.py`), each text from an empty cache, its prompt
first; transfers are of the completion. What is fitted or counted (predictor, popularity, slots
by layer) comes from other documents of the same domain, its best case. Simulated
from what the model really chose; that these counts are the runtime's is a test. Not measured: time.

    python benchmarks/evidence/run.py --tuned runs/demo/fine-tuned [--tuned-name NAME]
        [--judged 72] [--learned 144] [--slots 4 8 16]
        [--texts 8] [--out FILE]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from answers import answers
from caches import POLICIES, PREFETCHES, Cells, allocations, minus, rate, sizes, table, times
from choices import POLICY, QUARTER, prices
from counts import CAUSAL, counts
from texts import Seen, see, texts

from melinoe.checkpoint import describe, load_tokenizer
from melinoe.engine.load import load
from melinoe.measure import append_jsonl, machine
from melinoe.shipped import TINY_OLMOE
from melinoe.stats import Estimate

FULL = 72  # texts of each domain from which on a run is no trial

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--tuned", type=Path, required=True, help="a fine-tuned checkpoint")
    parser.add_argument("--tuned-name", default="fine-tuned", help="its name in the tables")
    parser.add_argument("--judged", type=int, default=FULL, help="texts of each domain")
    parser.add_argument("--learned", type=int, default=144, help="others of each, to learn from")
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 8, 16], help="8 among them")
    parser.add_argument("--texts", type=int, default=8, help="of each, read token by token")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if QUARTER not in args.slots:
        parser.error(f"the tables are about {QUARTER} slots; name {QUARTER} among --slots")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    began, cpu = time.monotonic(), time.process_time()

    def say(what: str) -> None:
        passed, used = time.monotonic() - began, time.process_time() - cpu
        print(f"{passed:5.0f} s, {used:5.0f} s of CPU: {what}", file=sys.stderr, flush=True)

    found: list[tuple[Seen, Cells]] = []
    split: Rows = []
    priced: Rows = []
    for name, path in (("base", TINY_OLMOE), (args.tuned_name, args.tuned)):
        everything = describe(str(path)).num_experts
        model, handle = load(str(path), "cpu", slots=everything, dtype=torch.float32, store="ram")
        tokenizer = load_tokenizer(str(path), model.config)
        domains = texts(tokenizer, args.judged, args.learned)
        for of in domains:
            seen = see(name, model, handle, of)
            say(f"{name} read {of.domain}")
            found.append((seen, table(seen, model, tokenizer, args.slots)))
            split += allocations(seen, args.slots)
            say(f"{name}, {of.domain}: {len(found[-1][1])} cells")
        handle.detach()
        priced += prices(name, path, domains, args.texts)
        say(f"{name}: price of other choices")

    settings = {
        "judged": args.judged,
        "learned": args.learned,
        "texts": args.texts,
        "slots": args.slots,
    }
    about = {"settings": {**settings, "fine-tuned": args.tuned_name}, "machine": machine()}
    args.out.unlink(missing_ok=True)
    trial = [] if args.judged >= FULL else [f"A trial with {args.judged} texts: shows no result."]
    done = records(found, split, priced)
    for record in (*done, answers([plain(one) for one in done])):
        notes = [*trial, *record["notes"]]
        append_jsonl(args.out, plain({**record, **about, "notes": notes}))


def records(found: list[tuple[Seen, Cells]], split: Rows, priced: Rows) -> Rows:
    """Everything measured, as tables for `melinoe report` and as the full table beside them."""
    matrices = []
    names = ("base-in", "base-out", "tuned-in", "tuned-out")
    for (seen, cells), name in zip(found, names, strict=True):
        matrices.append(
            {
                "benchmark": f"evidence-{name}",
                "title": f"{seen.model}, {seen.domain}: copies a token, {QUARTER} slots",
                "result": matrix(cells, QUARTER),
                "notes": [_READ, _MATRIX],
                "cells": full(cells),
            }
        )
    return [
        {
            "benchmark": "evidence-counts",
            "title": "In how many cases one loads less than another",
            "result": counts([cells for _, cells in found], split),
            "notes": [_COUNTS],
        },
        {
            "benchmark": "evidence-policies",
            "title": "Policies without prefetch: transfers a token",
            "result": [row for one in found for row in by_slots(*one)],
            "notes": [_READ, _BEST],
        },
        *matrices,
        {
            "benchmark": "evidence-prefetch",
            "title": f"What each prefetch brings and wastes, {POLICY}, {QUARTER} slots",
            "result": [row for one in found for row in by_prefetch(*one)],
            "notes": [_READ, _PREFETCH],
        },
        {
            "benchmark": "evidence-allocation",
            "title": "Slots by layer against as many for each: transfers a token",
            "result": split,
            "notes": [_READ, "Slots: the mean of the layers. Allocated: of each layer."],
        },
        {
            "benchmark": "evidence-choice",
            "title": f"What cache-aware choice costs and saves, {POLICY}, {QUARTER} slots",
            "result": priced,
            "notes": [
                "The router's first choice stays; read token by token, each text from an empty "
                "cache. Changes are paired by text. Strength: lambda of the cache prior."
            ],
        },
    ]


def matrix(cells: Cells, slots: int) -> Rows:
    """A row for each policy: copies a token with each prefetch, and without one against others."""
    rows = []
    for policy in POLICIES:
        none = cells[slots, policy, "none"]
        row: dict[str, Any] = {"policy": policy}
        row |= {name: rate(cells[slots, policy, name]) for name in PREFETCHES}
        row["none, minus lfu"] = minus(none, cells[slots, "lfu", "none"])
        row["none, times belady"] = times(none, cells[slots, "belady", "none"])
        rows.append(row)
    return rows


def by_slots(seen: Seen, cells: Cells) -> Rows:
    """A row for each number of slots: every policy on demand, and the best against others."""
    rows = []
    for slots in sizes(cells):
        of = {policy: cells[slots, policy, "none"] for policy in POLICIES}
        means = {policy: rate(of[policy]) for policy in POLICIES}
        best = min(CAUSAL, key=lambda policy: means[policy].mean)
        rows.append(
            {
                "model": seen.model,
                "domain": seen.domain,
                "slots": slots,
                **means,
                "fewest": best,
                "it minus lfu": minus(of[best], of["lfu"]),
                "it times belady": times(of[best], of["belady"]),
                "lfu times belady": times(of["lfu"], of["belady"]),
            }
        )
    return rows


def by_prefetch(seen: Seen, cells: Cells) -> Rows:
    """A row for each prefetch under one policy: what it brings."""
    rows = []
    none = cells[QUARTER, POLICY, "none"]
    for name in PREFETCHES:
        one = cells[QUARTER, POLICY, name]
        after = {**one, "left": one["uses"] - one["copies"]}
        rows.append(
            {
                "model": seen.model,
                "domain": seen.domain,
                "prefetch": name,
                "on demand": rate(one, "loads"),
                "ahead": rate(one, "ahead"),
                "on demand, minus none": minus(one, none, "loads"),
                "all copies, minus none": minus(one, none),
                "adjusted hit rate": rate(after, "left", "uses"),
            }
        )
    return rows


def full(cells: Cells) -> dict[str, Any]:
    """The whole table, compact: mean, low and high of every figure."""
    columns = ["demand", "ahead", "hit rate", "minus lfu", "minus none", "times belady"]
    rows = {}
    for (slots, policy, name), one in cells.items():
        estimates = (
            rate(one, "loads"),
            rate(one, "ahead"),
            rate(one, "hits", "uses"),
            minus(one, cells[slots, "lfu", name]),
            minus(one, cells[slots, policy, "none"]),
            times(one, cells[slots, "belady", "none"]),
        )
        rows[f"{slots} {policy} {name}"] = [[e.mean, e.low, e.high] for e in estimates]
    return {"columns": columns, "of": "demand and ahead together, a token", "rows": rows}


def plain(value: Any) -> Any:
    """JSON of it, with five digits: more say nothing beside an interval."""
    if isinstance(value, Estimate):
        return plain(value.to_dict())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


_READ = (
    "Per token of held-out completions that every model reads; a quarter of the experts is 8 "
    "slots; from an empty cache each, the prompt first; 95 % intervals over documents, differences "
    "and ratios paired."
)
_COUNTS = (
    "A case: one model, domain and number of slots; of prefetches also one policy that knows no "
    "future; of slots by layer one policy of two. Fewer and more: the whole interval is on that "
    "side of 0; with so many cases a few are there by chance."
)
_MATRIX = (
    "Columns: the prefetch, its loads charged. Belady is a bound without prefetch alone. Whatever "
    "is learned comes from other documents of the same domain."
)
_BEST = (
    "Fewest: the policy that knows no future and has the lowest mean, chosen on these very texts."
)
_PREFETCH = (
    "On demand, ahead: loads a token. Adjusted hit rate: all copies charged. What is "
    "learned comes from other documents of the same domain."
)


if __name__ == "__main__":
    main()
