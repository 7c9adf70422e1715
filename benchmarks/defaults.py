"""
Which settings of fine-tuning buy the fewest transfers for the least perplexity at equal compute?

One fine-tuning of the shipped model after the other, on 1,600 GSM8K examples of the training part,
200 optimiser steps of 8. Each is judged on 96 examples of the training part that no run sees (rows
6,000 on, which the demo does not judge on either): perplexity of the answer, and the loads of an
LFU cache of 8 of 32 experts that reads it. A run's price is its perplexity over its own control's:
the same run without the locality terms (`FinetuneSettings.control`).

Bad news would be: no setting with at least 2 times fewer transfers than the base below 5 % of
price; or a best rate at the edge of the grid.

Equal optimiser steps are not equal passes: replay reads 2 texts beside the 8. The result says
passes and seconds of each.

Appends one JSON line a run, and leaves alone what is there already, so it can be interrupted.

    python benchmarks/defaults.py --stage rates --seeds 0 1 2 --out runs.jsonl
    python benchmarks/defaults.py --summary runs.jsonl --out benchmarks/results/defaults.json
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from melinoe import attach
from melinoe.config import FinetuneSettings
from melinoe.data import Encoded, encode, load_examples, pad_token_id
from melinoe.evaluate import perplexity
from melinoe.finetune import train
from melinoe.finetune.own_text import own_text
from melinoe.measure import (
    append_jsonl,
    completion_costs,
    machine,
    reading_trace,
    write_json,
)
from melinoe.shipped import GSM8K_TRAIN, HELD_OUT, TINY_OLMOE

EXAMPLES, JUDGED_FROM, JUDGED, OTHERS = 1600, 6000, 96, 16
STEPS, BATCH, MAX_LENGTH, OWN_TEXTS, SLOTS = 200, 8, 200, 256, 8
OWN = {"lambda_replay": 0.1}


@dataclass(frozen=True)
class Run:
    """
    One fine-tuning: what differs from one run without replay.

    Runs that are *gone* had a teacher, or trained under the cache prior, which were taken out on
    what they showed: they stay in the record, and cannot be run again.
    """

    name: str
    changes: dict[str, Any]
    gone: bool = False

    def settings(self, seed: int) -> FinetuneSettings:
        return FinetuneSettings(
            steps=STEPS, batch_size=BATCH, max_length=MAX_LENGTH, seed=seed, own_texts=OWN_TEXTS,
            **{"lambda_replay": 0.0, **self.changes},
        )  # fmt: skip

    def control(self) -> Run:
        """The same run without the locality terms; one for all weights and priors."""
        name = re.sub(", (weight|prior) [0-9.]+", "", self.name)
        off = {**self.changes, "lambda_cache": 0.0}
        return Run(f"{name}: control", off)

    def key(self, seed: int) -> str:
        return f"{self.name}, seed {seed}"


def rates(low_rank: float, router: float, **changes: Any) -> dict[str, Any]:
    return {"lora_learning_rate": low_rank, "learning_rate": router, **changes}


def stages() -> dict[str, list[Run]]:
    """List the runs, by stage."""
    grid = [
        Run(f"low-rank {a:g}, routers {b:g}", rates(a, b))
        for a, b in (
            (4e-3, 4e-3), (2e-3, 2e-3), (8e-3, 8e-3), (2e-3, 5e-4), (2e-3, 1.25e-4),
        )
    ]  # fmt: skip
    best = rates(4e-3, 4e-3)
    recipes = [
        Run(
            f"{'taught' if taught else 'one run'}, weight {weight:g}, prior {prior:g}"
            f"{', own text' if own else ''}",
            {**best, "lambda_cache": weight, **own},
            gone=taught or prior > 0,
        )
        for taught, weight, prior, own in (
            (False, 1.0, 0.0, OWN), (False, 0.5, 0.0, OWN), (False, 2.0, 0.0, OWN),
            (False, 1.0, 0.2, OWN), (False, 0.5, 0.0, {}), (False, 1.0, 0.0, {}),
            (False, 2.0, 0.0, {}), (False, 1.0, 0.2, {}), (True, 1.0, 0.0, {}),
            (True, 2.0, 0.0, {}), (True, 2.0, 0.2, {}), (True, 2.0, 0.2, OWN),
        )
    ]  # fmt: skip
    grid.append(Run("low-rank 0.008, routers 0.008, own text", rates(8e-3, 8e-3, **OWN)))
    ranks = [Run(f"one run, own text, rank {r}", {**best, "lora_rank": r, **OWN}) for r in (8, 16)]
    return {"rates": grid, "recipes": recipes, "ranks": ranks}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One line a setting, over its seeds."""
    by_key = {row["key"]: row for row in rows}
    base = by_key["base"]
    table = []
    for stage, runs in stages().items():
        for run in runs:
            found = [row for row in rows if row["name"] == run.name]
            pairs = [(row, by_key[row["control"]]) for row in found]
            if not pairs:
                continue

            def spread(values: list[float]) -> dict[str, float] | float:
                if len(values) == 1:
                    return values[0]
                return {"median": statistics.median(values), "min": min(values),
                        "max": max(values)}  # fmt: skip

            table.append({
                "varied": stage,
                "setting": run.name,
                "seeds": len(pairs),
                "perplexity": spread([one["perplexity"] for one, _ in pairs]),
                "price over the control (%)": spread(
                    [100 * (one["perplexity"] / other["perplexity"] - 1) for one, other in pairs]
                ),
                "perplexity of other text": spread([one["other_perplexity"] for one, _ in pairs]),
                "transfers_per_token": spread([one["transfers_per_token"] for one, _ in pairs]),
                "times fewer than the base": spread(
                    [base["transfers_per_token"] / one["transfers_per_token"] for one, _ in pairs]
                ),
                "forward passes": pairs[0][0]["forward_passes"],
            })  # fmt: skip
    return {
        "benchmark": "defaults",
        "title": f"Fine-tuning the shipped model, {STEPS} optimiser steps in all",
        "result": table,
        "notes": [
            f"Judged on {JUDGED} examples of GSM8K's training part that no run saw; an LFU cache "
            f"of {SLOTS} of 32 experts. The base has a perplexity of {base['perplexity']:.1f} "
            f"({base['other_perplexity']:.1f} on other text) and "
            f"{base['transfers_per_token']:.2f} transfers per token.",
            "A control is the same run without the locality terms. Taught runs spent half of "
            "their steps on the teacher. Rates are at weight 1, without own text but where said.",
        ],
        "machine": base["machine"],
    }


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_OLMOE)


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=torch.float32)


@functools.cache
def texts() -> dict[str, list[Encoded]]:
    judged = load_examples(GSM8K_TRAIN, limit=JUDGED_FROM + JUDGED)[JUDGED_FROM:]
    others = [
        one
        for path in sorted(HELD_OUT.glob("*.jsonl"))
        for one in load_examples(path, limit=OTHERS)
    ]
    trained = load_examples(GSM8K_TRAIN, limit=EXAMPLES)
    return {
        "train": encode(trained, tokenizer(), MAX_LENGTH),
        "judged": encode(judged, tokenizer(), 512),
        "others": encode(others, tokenizer(), 512),
    }


@functools.cache
def anchor(seed: int) -> list[Encoded]:
    return own_text(base_model(), tokenizer(), OWN_TEXTS, MAX_LENGTH, seed=seed)


def judge(model: Any) -> dict[str, Any]:
    """Losses by text and loads by text; both as sums, so that runs can be paired."""
    found, others = (perplexity(model, texts()[name]) for name in ("judged", "others"))
    handle = attach(model, slots=model.config.num_experts)
    trace = reading_trace(model, handle, texts()["judged"])
    costs = completion_costs(trace, [SLOTS], "lfu")
    handle.detach()
    return {
        "nll": [round(float(x), 4) for x in found.nll],
        "tokens": [int(x) for x in found.tokens],
        "perplexity": float(np.exp(found.nll.sum() / found.tokens.sum())),
        "other_perplexity": float(np.exp(others.nll.sum() / others.tokens.sum())),
        "loads": costs.loads[0].tolist(),
        "read": costs.tokens.tolist(),
        "transfers_per_token": costs.loads.sum() / costs.tokens.sum(),
    }


def one_run(run: Run, seed: int) -> dict[str, Any]:
    settings = run.settings(seed)
    started = time.process_time()
    model = base_model()
    replayed = anchor(seed) if settings.lambda_replay else None
    done = train(
        model,
        texts()["train"],
        settings,
        pad_token_id=pad_token_id(tokenizer()),
        anchor_data=replayed,
    )
    seconds = time.process_time() - started
    return {
        "name": run.name, "key": run.key(seed), "control": run.control().key(seed), "seed": seed,
        "skipped_steps": done.skipped_steps, "processor_s": round(seconds, 1),
        "forward_passes": settings.steps * (1.25 if replayed else 1),
        "last": {k: v for k, v in done.rows[-1].items() if k in ("nll", "cache", "grad_norm")},
        **judge(model),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--stage", choices=list(stages()))
    parser.add_argument("--only", default="", help="runs whose name has this")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--summary", type=Path, help="runs to make a result of, in place of more")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.summary:
        rows = [json.loads(line) for line in arguments.summary.read_text().splitlines()]
        write_json(arguments.out, summary(rows))
        return
    known = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {json.loads(line)["key"] for line in known}
    if not done:
        row = {"name": "base", "key": "base", "control": None, "seed": None}
        append_jsonl(arguments.out, row | judge(base_model()) | {"machine": machine()})
    for seed in arguments.seeds:
        for run in stages()[arguments.stage]:
            if run.gone or arguments.only not in run.name:
                continue
            for one in (run.control(), run):
                if one.key(seed) in done:
                    continue
                done.add(one.key(seed))
                row = one_run(one, seed)
                append_jsonl(arguments.out, row)
                print(
                    f"{row['name']:50} seed {seed}  perplexity {row['perplexity']:.3f}  others "
                    f"{row['other_perplexity']:.1f}  transfers {row['transfers_per_token']:.3f}  "
                    f"{row['processor_s']:.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
