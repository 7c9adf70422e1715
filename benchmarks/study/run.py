"""
Does training for locality cost quality, and how much for how many transfers saved?

Runs the plan (`plan.py`), one fine-tuning of the shipped model after the other, judges each
(`judge.py`) and appends one JSON line a run; what is there already is left alone, so the study can
be interrupted and gone on with. `melinoe report` draws tables and figures from the file. Controls,
which teach others, and the runs of group ``goals`` leave their checkpoints in ``--keep``.

Bad news would be: no strength that saves transfers without raising perplexity over the control with
the same seed; or savings that come from the whole data set sharing a few experts (collapse).

Not measured here: speed (other benchmarks), and models larger than the shipped one.
"""

import argparse
import json
import logging
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from judge import judge
from plan import JUDGED_FROM, SEEDS, Run, all_runs

from melinoe.checkpoint.metadata import read_metadata
from melinoe.data import load_examples
from melinoe.finetune import FinetuneResult, finetune
from melinoe.finetune.terms.own_text import OWN
from melinoe.measure import append_jsonl, machine
from melinoe.shipped import GSM8K_TRAIN, TINY_OLMOE

JUDGED = 128


def train(run: Run, out: Path, keep: Path) -> FinetuneResult:
    """Train *run* into *out*; a taught one by its control, trained before if it is not there."""
    examples = load_examples(GSM8K_TRAIN)[: run.examples]
    teacher = None
    if run.taught:
        (control,) = [one for one in all_runs((run.seed,)) if one.name == run.control]
        teacher = kept_at(keep, control)
        if not teacher.exists():
            train(control, teacher, keep)
    settings = run.settings if run.group != "control" else replace(run.settings, save="both")
    anchor = OWN if run.own_text else None
    return finetune(TINY_OLMOE, examples, out, settings, anchor_examples=anchor, teacher=teacher)


def kept_at(keep: Path, run: Run) -> Path:
    """Where a run's checkpoint stays, if it does."""
    return keep / f"{run.name.replace(' ', '-').replace(',', '')}-{run.seed}"


def one_run(run: Run, out: Path, keep: Path) -> dict:
    """Train *run* if its checkpoint is not kept from before, judge it, and write the result."""
    began = time.monotonic()
    stays = run.group in ("control", "goals")
    with tempfile.TemporaryDirectory() as work:
        checkpoint = kept_at(keep, run) if stays else Path(work) / "model"
        if checkpoint.exists():
            log = read_metadata(checkpoint)["log"]
        else:
            log = train(run, checkpoint, keep).log
        held_out = load_examples(GSM8K_TRAIN)[JUDGED_FROM : JUDGED_FROM + JUDGED]
        found = judge(checkpoint, held_out, written=run.full)
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
        "log": log,
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
    return json.dumps(
        {
            "run": f"{result['group']}/{result['name']}/{result['seed']}",
            "perplexity": round(result["quality"]["gsm8k"]["perplexity"]["mean"], 3),
            "transfers_lfu_8": round(transfers, 3),
            "seconds": result["seconds"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/study.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", help="run only groups or names that contain this")
    parser.add_argument("--keep", type=Path, default=Path("study-checkpoints"))
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
            print(summary(one_run(run, arguments.out, arguments.keep)), flush=True)


if __name__ == "__main__":
    main()
