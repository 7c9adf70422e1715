"""
Does predicting from the prompt earn its keep?

For the shipped model and one that was fine-tuned for locality: recall of the completion's experts
by each strategy at 12.5, 25 and 50 % of the experts, on GSM8K and on mixed traffic, read (the same
text for both models) and written greedily; what the prefetch saves in transfers, its own loads
charged in full; and how long a guess takes beside the time to the first token. Intervals are over
documents.

Bad news would be: the learned predictor no better than the experts that the prompt itself used,
which are free; no transfers saved once its own loads are charged.

Known limits: the model is small and repeats itself, so a prompt of 64 tokens uses most experts and
prefetches before it are pointless; all are made between prompt and completion. A prefetch never
lowers the bytes of experts that will be used: loads saved here are loads that a cache without it
wasted on the prompt's leavings.

    python benchmarks/predictor/run.py --tuned runs/demo/fine-tuned [--limit 12]

About five minutes on one core. `melinoe demo --out runs/demo` leaves such a checkpoint, which has
seen none of the questions asked here; any other that was fine-tuned from the shipped model will do.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from guesses import RIVALS, Traffic, learned, traffic_of
from judge import best_of, by_document, difference, estimate, loads_per_token, recalls, transfers
from times import times
from traffic import MATHS, Item, Model, in_order, mixed, observe, written_rows

from melinoe.measure import append_jsonl, machine
from melinoe.shipped import TINY_OLMOE

SHARES = (0.125, 0.25, 0.5)
SERVED = 0.25  # of the experts; what predictors are fitted for
ORDER = ("popularity", "prefill", "learned")


def traffics(model: Model, items: list[Item]) -> Iterator[tuple[str, Traffic]]:
    """GSM8K and mixed traffic, each read and written, in an order drawn once."""
    answered = written_rows(items)
    for kind, trace, rows in (
        ("read", model.read, range(len(items))),
        ("written", model.written, answered),
    ):
        own = [items[row] for row in rows]
        maths = [k for k, one in enumerate(own) if one.source == MATHS]
        # In written traffic a question for each document of another source.
        most = max((one.document for one in own if one.source != MATHS), default=0)
        some = mixed(own) if kind == "read" else [
            k for k, one in enumerate(own) if one.source != MATHS or one.document <= most
        ]  # fmt: skip
        for name, chosen in (("GSM8K", maths), ("mixed", some)):
            order = list(np.random.default_rng(0).permutation(chosen))
            ordered = in_order(trace, order)
            yield f"{name}, {kind}", traffic_of(model, ordered, [own[k] for k in order])


def compared(
    name: str, model: Model, traffic: Traffic, experts: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """For each number of slots a row of recalls and a row of transfers."""
    served = round(SERVED * experts)
    guesses = learned(traffic, served)
    popularity = guesses["popularity"]
    guesses["prefill"] = traffic.own + popularity * 1e-6 * (traffic.own > 0)
    guesses = {strategy: guesses[strategy] for strategy in ORDER}
    for share in SHARES if name.endswith("read") else (SERVED,):
        slots = round(share * experts)
        about = {
            "model": model.name,
            "traffic": name,
            "slots": slots,
            "documents": int(np.unique(traffic.document).size),
        }
        found = recalls(traffic, {**guesses, "ceiling": traffic.used}, slots)
        sums = {key: by_document(traffic, value) for key, value in found.items()}
        rival = best_of(RIVALS, {key: float(found[key].mean()) for key in RIVALS})
        yield (
            {
                **about,
                **{key: estimate(value) for key, value in sums.items()},
                "best_free_rival": rival,
                "learned_minus_it": difference(sums["learned"], sums[rival]).to_dict(),
            },
            _transfers(about, traffic, guesses, slots),
        )


def _transfers(
    about: dict[str, Any], traffic: Traffic, guesses: dict[str, Any], slots: int
) -> dict[str, Any]:
    """Loads per token of each strategy from a cold cache; on demand alone for the learned one."""
    found = {
        way: transfers(traffic, scores, slots) for way, scores in {"none": None, **guesses}.items()
    }
    loads = {way: loads_per_token(traffic, one) for way, one in found.items()}
    waited = {way: by_document(traffic, one["demand"], one["tokens"]) for way, one in found.items()}
    means = {way: float(top.sum() / bottom.sum()) for way, (top, bottom) in loads.items()}
    return {
        **about,
        **{way: estimate(sums) for way, sums in loads.items()},
        "fewest": best_of(tuple(means), means, lowest=True),
        "learned_saves": difference(loads["none"], loads["learned"]).to_dict(),
        "prefill_saves": difference(loads["none"], loads["prefill"]).to_dict(),
        "learned_saves_on_demand": difference(waited["none"], waited["learned"]).to_dict(),
        "prefill_saves_on_demand": difference(waited["none"], waited["prefill"]).to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tuned", type=Path, required=True, help="a fine-tuned checkpoint")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/predictor.jsonl"))
    parser.add_argument("--limit", type=int, help="documents of each source, for trying")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    study(arguments.tuned, arguments.out, arguments.limit)


def study(tuned: Path, out: Path, limit: int | None) -> None:
    """Both models through everything; the records to *out*."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TITLES}
    for name, path in (("base", TINY_OLMOE), ("fine-tuned", tuned)):
        began = time.monotonic()
        model, items = observe(name, path, limit)
        experts = model.read.num_experts
        print(f"{name}: observed, {time.monotonic() - began:.0f} s", flush=True)
        for traffic_name, traffic in traffics(model, items):
            for by_recall, by_loads in compared(traffic_name, model, traffic, experts):
                rows["predictor-recall"].append(by_recall)
                rows["predictor-transfers"].append(by_loads)
            print(f"{name}, {traffic_name}: {time.monotonic() - began:.0f} s", flush=True)
        rows["predictor-ttft"].extend(times(model, items, round(SERVED * experts)))
        print(f"{name}: done, {time.monotonic() - began:.0f} s", flush=True)
    out.unlink(missing_ok=True)
    for name, table in rows.items():
        title, notes = TITLES[name]
        record = {
            "benchmark": name,
            "title": title,
            "result": table,
            "notes": notes,
            "machine": machine(),
        }
        append_jsonl(out, record)
        for row in table:
            print(json.dumps({"benchmark": name, **row}))


TITLES = {
    "predictor-recall": (
        "Recall of the completion's experts, by strategy",
        ["Intervals over documents. Slots of 32 experts a layer."],
    ),
    "predictor-transfers": (
        "Transfers per token, demand and prefetch together, by strategy",
        [
            "LFU, cold before each request, prefetch between prompt and completion; simulated, "
            "which equals the runtime's counts. On demand: the prefetch's own loads not charged."
        ],
    ),
    "predictor-ttft": (
        "Time of a guess beside the time to the first token",
        ["The shipped model's first token takes milliseconds; a larger model's takes longer."],
    ),
}


if __name__ == "__main__":
    main()
