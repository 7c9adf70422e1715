"""
Does each sequence come to prefer few experts, beyond what its kind of text or one fixed set gives?

One row of the experiment is one command: it fine-tunes the base on seven kinds of text mixed by
document, judges the result (`judge.py`) on held-out texts of those kinds, of two never trained on
and of texts that change kind in the middle, and writes one file, OUT/ROW-SEED.json. A command that
was stopped goes on from its last checkpoint when it is given again; a file that is there is left
alone. So the experiment runs over as many sessions as it needs; `table.py` sets rows beside their
controls.

    python benchmarks/kinds/run.py --corpora CORPUS_DIR --row "resident 1" --seed 0
    python benchmarks/kinds/run.py --list

A row's control is the same run without its locality term: same data, replay, steps and seed. It is
a row of its own. Rows that prune start from the control of the same seed, which they train if it is
not kept in --work, drop all but its most used experts, and train the rest as long again.

Bad news would be: no row that moves 2.5 times fewer experts than its control at +2 % perplexity or
less in each kind; or a text's own half that serves its other half no better than its kind's set.
Not measured here: speed.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import texts
import torch
import transformers
from judge import judge
from terms import FIRST_LEFT_OUT, FIXED, FIXED_BY_KIND, in_place_of_cache_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

import melinoe
from melinoe.cache.locality import popularity
from melinoe.checkpoint.pruning import prune
from melinoe.config import FinetuneSettings
from melinoe.data import Encoded, Example, encode
from melinoe.finetune import finetune
from melinoe.measure import machine, reading_trace, write_json
from melinoe.moe.experts import find_experts
from melinoe.shipped import TINY_OLMOE

PER_KIND = 240
COUNTED = 24  # texts of each kind from which a fixed set is counted
STEPS, BATCH, MAX_LENGTH, OWN_TEXTS, SAVE_EVERY = 200, 8, 320, 256, 20


@dataclass(frozen=True)
class Row:
    """
    One way of training: *changes* to the defaults, with *term* in place of the cache simulation.

    *prune*: first drop all but so many experts of a layer of the control.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    control: str = "control"
    term: str | None = None
    prune: int | None = None

    def settings(self, seed: int) -> FinetuneSettings:
        common = {
            "steps": STEPS, "batch_size": BATCH, "max_length": MAX_LENGTH, "own_texts": OWN_TEXTS,
            "save_every": SAVE_EVERY, "seed": seed,
        }  # fmt: skip
        return FinetuneSettings(**{**common, **self.changes})


def rows() -> Iterator[Row]:
    """List them, controls first."""
    none: dict[str, Any] = {"lambda_cache": 0.0}
    attention = {"train": "router+experts+attention"}
    yield Row("control", none)
    yield Row("attention control", none | attention, "attention control")
    for weight in (0.5, 1.0, 2.0):
        yield Row(f"resident {weight:g}", {"lambda_cache": weight})
        yield Row(f"{FIXED} {weight:g}", {"lambda_cache": weight}, term=FIXED)
        yield Row(f"concentration {weight:g}", none | {"lambda_concentration": weight})
    yield Row("clipped 1", {"cache_loss": "clipped"})
    yield Row("literal 0.25", {"cache_loss": "literal", "lambda_cache": 0.25})
    yield Row(f"{FIXED_BY_KIND} 1", term=FIXED_BY_KIND)
    yield Row(f"{FIRST_LEFT_OUT} 1", term=FIRST_LEFT_OUT)
    yield Row("resident 1, concentration 1", {"lambda_concentration": 1.0})
    yield Row("attention, resident 1", attention, "attention control")
    yield Row("attention, concentration 1", none | attention | {"lambda_concentration": 1.0},
              "attention control")  # fmt: skip
    for kept in (8, 12, 16):  # a cache to watch has to hold a token's experts
        yield Row(f"pruned to {kept}", none | {"capacity": 0.5}, prune=kept)


def uses_by_kind(
    base: Path, tokenizer: Any, training: dict[str, list[Example]]
) -> dict[str, np.ndarray]:
    """The base's choices of each expert on some of what is trained on, (layers, experts)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    handle = melinoe.attach(model, slots=find_experts(model)[0].num_experts)
    found = {
        kind: popularity(
            reading_trace(model, handle, encode(some[:COUNTED], tokenizer, MAX_LENGTH))
        )
        for kind, some in training.items()
    }
    handle.detach()
    return found


def train(row: Row, seed: int, arguments: argparse.Namespace) -> Path:
    """Train the row in the work directory, or go on there; returns the checkpoint."""
    out = arguments.work / f"{row.name.replace(' ', '-').replace(',', '')}-{seed}"
    base: Path = arguments.base
    tokenizer = AutoTokenizer.from_pretrained(base)
    training = texts.trained(arguments.corpora, PER_KIND)
    if row.prune is not None:
        control = train(next(one for one in rows() if one.name == row.control), seed, arguments)
        uses = sum(uses_by_kind(control, tokenizer, training).values())
        base = out.with_name(out.name + ".base")
        kept = np.argsort(-uses, axis=1, kind="stable")[:, : row.prune]
        if not base.exists():
            prune(str(control), kept.tolist(), base)
    encoded: dict[str, list[Encoded]] = {}
    uses_of: dict[str, np.ndarray] = {}
    if row.term is not None:
        encoded = {kind: encode(some, tokenizer, MAX_LENGTH) for kind, some in training.items()}
        uses_of = uses_by_kind(base, tokenizer, training)
    mixed = [one for group in zip(*training.values(), strict=True) for one in group]
    with in_place_of_cache_loss(row.term, uses_of, encoded):
        finetune(base, mixed, out, row.settings(seed), resume=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print the rows")
    add("--row", help="its name; base: the base model itself")
    add("--seed", type=int, default=0)
    add("--corpora", type=Path, help="directory that the base was trained from")
    add("--base", type=Path, default=TINY_OLMOE)
    add("--work", type=Path, default=Path("kinds-checkpoints"))
    add("--out", type=Path, default=Path("benchmarks/results/kinds"))
    add("--threads", type=int, default=1)
    arguments = parser.parse_args()
    known = {one.name: one for one in rows()}
    if arguments.list:
        print("\n".join(["base", *known]))
        return
    if arguments.row != "base" and arguments.row not in known:
        parser.error(f"--row is one of those that --list prints, not {arguments.row!r}")
    target = (
        arguments.out / f"{arguments.row.replace(' ', '-').replace(',', '')}-{arguments.seed}.json"
    )
    if target.exists():
        print(f"{target} is there")
        return
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.work.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    held = texts.held_out(tokenizer)
    kinds = sorted(held.keys() - {*texts.UNSEEN, texts.CHANGED})
    row = known.get(arguments.row, Row("base"))
    path = arguments.base
    if row.name != "base":
        path = train(row, arguments.seed, arguments)
    config = transformers.AutoConfig.from_pretrained(arguments.base)
    write_json(
        target,
        {
            "kind": "kinds",
            "row": row.name,
            "control": row.control,
            "seed": arguments.seed,
            "settings": asdict(row.settings(arguments.seed)),
            "term": row.term,
            "prune": row.prune,
            "kinds": kinds,
            "judged_on": texts.digest(held),
            **judge(path, held, kinds, config.num_experts),
            "processor_s": round(time.process_time() - began, 1),
            "machine": machine(),
        },
    )
    print(target)


if __name__ == "__main__":
    main()
