"""
Does training for locality cost quality, and how much for how many transfers saved?

Runs the plan (`plan.py`), one fine-tuning of the shipped model after the other, judges each
(`judge.py`) and appends one JSON line a run; what is there already is left alone, so the study can
be interrupted and gone on with. `tables.py` writes tables and figures from the file. Runs of groups
``plain`` and ``goals`` leave their checkpoints in ``--keep``.

Bad news would be: no strength that saves transfers without raising perplexity over the same
training without the locality terms; or savings that come from the whole data set sharing a few
experts (collapse).

``--base`` takes another model of the same tokenizer's kind, such as a larger one of the recipe
(`benchmarks/gpu/larger_model.sh`); its results go into a file of their own.

Not measured here: speed (other benchmarks).
"""

import argparse
import json
import logging
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from judge import QUARTER, judge
from plan import JUDGED_FROM, SEEDS, Run, all_runs

from melinoe.checkpoint.metadata import read_metadata
from melinoe.config import FinetuneSettings, experts_in_share
from melinoe.data import load_examples
from melinoe.finetune import FinetuneResult, finetune
from melinoe.finetune.own_text import OWN
from melinoe.measure import append_jsonl, machine
from melinoe.shipped import GSM8K_TRAIN, TINY_OLMOE

JUDGED = 128


@dataclass(frozen=True)
class Ground:
    """What all runs share: the base model, where checkpoints stay, and what differs on it."""

    base: Path
    keep: Path
    rate: float = 1.0
    steps: int | None = None
    bf16: bool = False

    def settings(self, run: Run) -> FinetuneSettings:
        """Those of *run* on this ground."""
        own = run.settings
        rate = self.rate * own.learning_rate
        return replace(
            own,
            learning_rate=rate,
            steps=self.steps or own.steps,
            compute_dtype="bfloat16" if self.bf16 else "float32",
        )


def train(run: Run, out: Path, ground: Ground) -> FinetuneResult:
    """Train *run* into *out*."""
    examples = load_examples(GSM8K_TRAIN)[: run.examples]
    settings = ground.settings(run)
    if run.group == "plain":
        settings = replace(settings, save="both")
    anchor = OWN if run.own_text else None
    return finetune(ground.base, examples, out, settings, anchor_examples=anchor)


def kept_at(keep: Path, run: Run) -> Path:
    """Where a run's checkpoint stays, if it does."""
    return keep / f"{run.name.replace(' ', '-').replace(',', '')}-{run.seed}"


def one_run(run: Run, out: Path, ground: Ground) -> dict:
    """Train *run* if its checkpoint is not kept from before, judge it, and write the result."""
    began = time.monotonic()
    stays = run.group in ("plain", "goals")
    with tempfile.TemporaryDirectory() as work:
        checkpoint = kept_at(ground.keep, run) if stays else Path(work) / "model"
        if checkpoint.exists():
            log = read_metadata(checkpoint)["log"]
        else:
            log = train(run, checkpoint, ground).log
        held_out = load_examples(GSM8K_TRAIN)[JUDGED_FROM : JUDGED_FROM + JUDGED]
        found = judge(checkpoint, held_out, written=run.full)
    result = {
        "kind": "study",
        "group": run.group,
        "family": run.family,
        "strength": run.strength,
        "name": run.name,
        "plain": run.plain,
        "seed": run.seed,
        "changes": run.changes,
        "settings": asdict(ground.settings(run)),
        "examples": run.examples,
        "log": log,
        **found,
        "seconds": round(time.monotonic() - began, 1),
        "machine": machine(),
    }
    append_jsonl(out, result)
    return result


def base_run(out: Path, base: Path) -> None:
    """The base model itself, judged in the same way."""
    examples = load_examples(GSM8K_TRAIN)[JUDGED_FROM : JUDGED_FROM + JUDGED]
    found = judge(base, examples)
    about = {"kind": "study", "group": "base", "family": "base", "name": "base", "seed": 0}
    append_jsonl(out, {**about, **found, "machine": machine()})


def done_already(out: Path) -> set[tuple[str, int]]:
    """Name and seed of every run that *out* holds."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return {(record["name"], record["seed"]) for record in map(json.loads, lines)}


def summary(result: dict) -> str:
    """One line of a run."""
    cache = f"lfu-{experts_in_share(QUARTER, result['num_experts'])}"
    transfers = result["transfers"][cache]["transfers_per_token"]
    return json.dumps(
        {
            "run": f"{result['group']}/{result['name']}/{result['seed']}",
            "perplexity": round(result["quality"]["gsm8k"]["perplexity"]["mean"], 3),
            "transfers": round(transfers, 3),
            "seconds": result["seconds"],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/study.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", help="run only groups or names that contain this")
    parser.add_argument("--name", action="append", help="run only what has this name; repeatable")
    parser.add_argument("--keep", type=Path, default=Path("study-checkpoints"))
    parser.add_argument("--base", type=Path, default=TINY_OLMOE, help="checkpoint to start from")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on every learning rate")
    parser.add_argument("--steps", type=int, help="of every run, for a trial")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    ground = Ground(arguments.base, arguments.keep, arguments.rate, arguments.steps, arguments.bf16)
    there = done_already(arguments.out)
    if ("base", 0) not in there:
        base_run(arguments.out, arguments.base)
    for run in all_runs(tuple(arguments.seeds)):
        wanted = not arguments.only or arguments.only in f"{run.group}/{run.name}"
        wanted = wanted and (not arguments.name or run.name in arguments.name)
        if wanted and (run.name, run.seed) not in there:
            print(summary(one_run(run, arguments.out, ground)), flush=True)


if __name__ == "__main__":
    main()
