"""
Set the rows of `run.py` beside their controls: one result for docs/study.md.

    python benchmarks/kinds/table.py benchmarks/results/kinds --out benchmarks/results/kinds.json

Prices are perplexity over that of the control of the same seed, paired by text; kinds weigh by
their tokens, and the highest of them stands beside. Times fewer: the control's loads over the
row's, LFU, each text from an empty cache. Intervals are over texts, those of all seeds together.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from texts import CHANGED, UNSEEN

from melinoe.measure import write_json
from melinoe.stats import Estimate, bootstrap, paired_ratio

SHARES = ("0.125", "0.25", "0.5")
PINNED = (
    "global",
    "kind",
    "other kind",
    "other sequence",
    "own",
    "kind, second half",
    "first half",
)
Record = dict[str, Any]


def gather(directory: Path) -> dict[str, dict[int, Record]]:
    """Row to seed to result; refuses results that were judged on other texts."""
    found: dict[str, dict[int, Record]] = defaultdict(dict)
    for path in sorted(directory.glob("*.json")):
        one = json.loads(path.read_text())
        found[one["row"]][one["seed"]] = one
    if len(judged := {one["judged_on"] for seeds in found.values() for one in seeds.values()}) > 1:
        raise SystemExit(f"results were judged on different texts: {', '.join(sorted(judged))}")
    return found


def column(records: list[Record], kinds: list[str], *path: str) -> np.ndarray:
    """One number for each text: of all *records*, and all *kinds*."""
    values = []
    for one in records:
        for kind in kinds:
            entry = one["texts"][kind]
            for key in path:
                entry = entry[key]
            values += entry
    return np.array(values, dtype=float)


def price(ours: list[Record], theirs: list[Record], kinds: list[str]) -> Estimate:
    """Per cent of perplexity over the control, kinds weighing by their tokens."""
    more = column(ours, kinds, "nll") - column(theirs, kinds, "nll")
    tokens = column(ours, kinds, "tokens")
    return bootstrap(more, tokens, transform=lambda rate: 100 * np.expm1(rate))


def line(name: str, seeds: dict[int, Record], controls: dict[int, Record]) -> Record:
    """One row of the table."""
    both = sorted(seeds.keys() & controls.keys())
    ours, theirs = [seeds[one] for one in both], [controls[one] for one in both]
    kinds = ours[0]["kinds"]
    prices = {kind: price(ours, theirs, [kind]) for kind in kinds}
    worst = max(prices, key=lambda kind: prices[kind].mean)
    found: Record = {
        "row": name,
        "seeds": len(both),
        "price, all kinds (%)": price(ours, theirs, kinds).to_dict(),
        "highest price of a kind (%)": prices[worst].to_dict(),
        "that kind": worst,
        "price, unseen kinds (%)": price(ours, theirs, list(UNSEEN)).to_dict(),
        "price, changing kind (%)": price(ours, theirs, [CHANGED]).to_dict(),
    }
    for share in SHARES:
        mine, other = (column(one, kinds, "loads", f"lfu {share}") for one in (ours, theirs))
        if mine.sum():
            found[f"times fewer at {share}"] = paired_ratio(other, mine).to_dict()
    tokens = column(ours, kinds, "tokens").sum()
    found["lfu, a quarter"] = column(ours, kinds, "loads", "lfu 0.25").sum() / tokens
    for rule in PINNED:
        half = 2 if rule in ("first half", "kind, second half") else 1  # of the tokens
        found[f"pinned: {rule}"] = half * column(ours, kinds, "pinned", rule).sum() / tokens
    for unit in ("sequence", "kind"):
        of = [one["texts"][kind]["experts"][unit] for one in ours for kind in kinds]
        found[f"experts of a {unit}"] = float(np.mean(of))
    found["experts of all"] = float(np.mean([one["experts_of_all"] for one in ours]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = gather(arguments.results)
    lines = []
    for name, seeds in found.items():
        controls = found.get(next(iter(seeds.values()))["control"], {})
        if seeds.keys() & controls.keys():
            lines.append(line(name, seeds, controls))
    lines.sort(key=lambda one: one["lfu, a quarter"])
    some = next(iter(next(iter(found.values())).values()))
    record = {
        "benchmark": "kinds",
        "title": "Fine-tuning on seven kinds of text at once",
        "result": lines,
        "notes": [" ".join(text.split()) for text in (__doc__ or "").split("\n\n")[2:]],
        "machine": some["machine"],
    }
    if arguments.out is not None:
        write_json(arguments.out, record)
    for one in lines:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
