"""Checkpoints that the study kept, as a command line names them."""

import argparse
import json
from pathlib import Path

import torch
import transformers

from melinoe.shipped import TINY_OLMOE

BASE = "base"


def parser(about: str, out: str) -> argparse.ArgumentParser:
    """What the scripts on kept checkpoints have in common."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    made = argparse.ArgumentParser(description=about.strip().split("\n\n")[0])
    made.add_argument("checkpoints", nargs="*", help="NAME:SEED=PATH, as the study names them")
    made.add_argument("--out", type=Path, default=Path("benchmarks/results/raw") / out)
    return made


def given(checkpoints: list[str]) -> list[tuple[str, int, str]]:
    """Name, seed and path of each, the shipped model first."""
    found = [(BASE, 0, str(TINY_OLMOE))]
    for one in checkpoints:
        about, path = one.split("=", 1)
        name, seed = about.rsplit(":", 1)
        found.append((name, int(seed), path))
    return found


def done(out: Path, *keys: str) -> set[tuple]:
    """What *out* holds already, by the values of *keys*."""
    lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    return {tuple(record[key] for key in keys) for record in map(json.loads, lines)}
