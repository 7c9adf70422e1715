"""
Does training for locality cost quality, and how much for how many transfers saved?

Runs the plan (`plan.py`), one fine-tuning of the shipped model after the other, judges each
(`judge.py`) and appends one JSON line a run; what is there already is left alone, so the study can
be interrupted and gone on with. `melinoe report` draws tables and figures from the file.

Bad news would be: no strength that saves transfers without raising perplexity over the control with
the same seed; or savings that come from the whole data set sharing a few experts (collapse).

Not measured here: speed (other benchmarks), and models larger than the shipped one.
"""

import argparse
import json
import logging
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from judge import judge
from plan import JUDGED_FROM, SEEDS, Run, all_runs

from melinoe.data import load_examples
from melinoe.finetune import finetune
from melinoe.finetune.terms.own_text import OWN
from melinoe.measure import append_jsonl, machine
from melinoe.shipped import GSM8K_TRAIN, TINY_OLMOE

JUDGED = 128


def one_run(run: Run, out: Path) -> dict:
    """Train, judge, and write the result of *run*; the checkpoint is thrown away."""
    began = time.monotonic()
    everything = load_examples(GSM8K_TRAIN)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = Path(work) / "model"
        anchor = OWN if run.own_text else None
        data = everything[: run.examples]
        done = finetune(TINY_OLMOE, data, checkpoint, run.settings, anchor_examples=anchor)
        found = judge(checkpoint, everything[JUDGED_FROM : JUDGED_FROM + JUDGED])
        shutil.rmtree(checkpoint)
    result = {
        "kind": "study",
        "group": run.group,
        "family": run.family,
        "strength": run.strength,
        "name": run.name,
        "control": run.control,
        "seed": run.seed,
        "changes": run.changes,
        "settings": asdict(run.settings),
        "examples": run.examples,
        "log": done.log,
        **found,
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine(),
    }
    append_jsonl(out, result)
    return result


def base_run(out: Path) -> None:
    """The shipped model itself, judged in the same way."""
    examples = load_examples(GSM8K_TRAIN)[JUDGED_FROM : JUDGED_FROM + JUDGED]
    found = judge(TINY_OLMOE, examples)
    about = {"kind": "study", "group": "base", "family": "base", "name": "base", "seed": 0}
    append_jsonl(out, {**about, **found, "machine": machine()})


def done_already(out: Path) -> set[tuple[str, int]]:
    """Name and seed of every run that *out* holds."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return {(record["name"], record["seed"]) for record in map(json.loads, lines)}


def summary(result: dict) -> str:
    """One line of a run."""
    transfers = result["transfers"]["lfu-8"]["transfers_per_token"]
    written = result["written"]["transfers"]["lfu-8"]["transfers_per_token"]
    return json.dumps(
        {
            "run": f"{result['group']}/{result['name']}/{result['seed']}",
            "perplexity": round(result["quality"]["gsm8k"]["perplexity"]["mean"], 3),
            "transfers_lfu_8": round(transfers, 3),
            "written_lfu_8": round(written, 3),
            "seconds": result["seconds"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/study.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", help="run only groups or names that contain this")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    there = done_already(arguments.out)
    if ("base", 0) not in there:
        base_run(arguments.out)
    for run in all_runs(tuple(arguments.seeds)):
        wanted = not arguments.only or arguments.only in f"{run.group}/{run.name}"
        if wanted and (run.name, run.seed) not in there:
            print(summary(one_run(run, arguments.out)), flush=True)


if __name__ == "__main__":
    main()
