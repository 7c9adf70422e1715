"""
Does training for locality cost quality, and how much for how many transfers saved?

Runs the plan (`plan.py`), one fine-tuning of the shipped model after the other, judges each
(`judge.py`) and writes one JSON file a run; what is there already is left alone, so the study can
be interrupted and gone on with. `melinoe report` draws the figures from the files.

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
from plan import JUDGED_FROM, Run, all_runs

from melinoe.data import load_examples
from melinoe.finetune import finetune
from melinoe.measure import machine, write_json
from melinoe.shipped import GSM8K_TRAIN, TINY_OLMOE

JUDGED = 128


def one_run(run: Run, out: Path) -> dict:
    """Train, judge, and write the result of *run*; the checkpoint is thrown away."""
    began = time.monotonic()
    everything = load_examples(GSM8K_TRAIN)
    with tempfile.TemporaryDirectory() as work:
        checkpoint = Path(work) / "model"
        done = finetune(TINY_OLMOE, everything[: run.examples], checkpoint, run.settings)
        found = judge(checkpoint, everything[JUDGED_FROM : JUDGED_FROM + JUDGED])
        shutil.rmtree(checkpoint)
    result = {
        "study": run.group,
        "name": run.name,
        "seed": run.seed,
        "changes": run.changes,
        "settings": asdict(run.settings),
        "examples": run.examples,
        "log": done.log,
        **found,
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine(),
    }
    write_json(out / run.file, result)
    return result


def base_run(out: Path) -> None:
    """The shipped model itself, judged in the same way."""
    file = out / "base" / "base.json"
    if not file.exists():
        examples = load_examples(GSM8K_TRAIN)[JUDGED_FROM : JUDGED_FROM + JUDGED]
        found = judge(TINY_OLMOE, examples)
        write_json(file, {"study": "base", "name": "base", **found, "machine": machine()})


def summary(result: dict) -> str:
    """One line of a run."""
    transfers = result["transfers"]["lfu-8"]["transfers_per_token"]
    return json.dumps(
        {
            "run": f"{result['study']}/{result['name']}/{result['seed']}",
            "perplexity": round(result["quality"]["gsm8k"]["perplexity"]["mean"], 3),
            "transfers_lfu_8": round(transfers, 3),
            "seconds": result["seconds"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/study"))
    parser.add_argument("--only", help="run only groups or names that contain this")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    base_run(arguments.out)
    for run in all_runs():
        wanted = not arguments.only or arguments.only in f"{run.group}/{run.name}"
        if wanted and not (arguments.out / run.file).exists():
            print(summary(one_run(run, arguments.out)), flush=True)


if __name__ == "__main__":
    main()
