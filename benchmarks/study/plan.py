"""
The runs of the study: what is varied, around which settings, with which seeds.

Every run is one fine-tuning of the shipped model on GSM8K, judged by `judge`. A run's name says
what differs from `BASE`. Runs of group ``plain`` train on next tokens alone. The control of a run
is the one that differs from it in the locality terms alone.

Settings that were taken out on what their runs showed (teachers, anchors, the cache prior,
distillation, a gradient through the cache, swap margin, reuse, curriculum) are no longer planned;
their runs stay in `benchmarks/results/study.jsonl`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from melinoe.config import FinetuneSettings

SEEDS = (0, 1, 2)
EXAMPLES = 1600  # of the training part; rows from 6,000 on are kept for judging
JUDGED_FROM = 6000

BASE = FinetuneSettings(
    steps=200,
    batch_size=8,
    max_length=200,
    learning_rate=2e-3,
    lambda_cache=0.5,
    cache_loss="clipped",
    lambda_replay=0.0,
    own_texts=512,
)


@dataclass(frozen=True)
class Run:
    """
    One fine-tuning: *changes* to `BASE`; *examples* to train on.

    Runs of one *family* differ in *strength* alone; *plain* is the name of the plain fine-tuning
    that each stands beside, seed by seed. With *own_text*, the base model writes anchor text to
    replay. *full* runs are judged in their own greedy text too.
    """

    group: str
    family: str
    strength: float | None
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    plain: str = "plain"
    examples: int = EXAMPLES
    own_text: bool = False
    full: bool = True

    @property
    def name(self) -> str:
        """Family and strength."""
        return self.family if self.strength is None else f"{self.family} {self.strength:g}"

    @property
    def settings(self) -> FinetuneSettings:
        """What `melinoe.finetune` is given."""
        return replace(BASE, seed=self.seed, **self.changes)


def _run(group: str, family: str, strength: float | None = None, **changes: Any) -> Run:
    own = ("plain", "examples", "own_text", "full")
    kept = {key: changes.pop(key) for key in own if key in changes}
    return Run(group, family, strength, 0, changes, **kept)


def _frontier() -> Iterator[Run]:
    """Forms of the cache term, the paper's among them, each at several strengths."""
    yield _run("plain", "plain", lambda_cache=0.0)
    for strength in (0.25, 0.5, 1.0, 2.0):
        yield _run("frontier", "clipped", strength, lambda_cache=strength)
    for strength in (0.1, 0.25, 0.5):
        yield _run("frontier", "literal", strength, lambda_cache=strength, cache_loss="literal")


OWN = {"own_text": True, "lambda_replay": 0.25}
LONG = {"steps": 700, "examples": 5600}
# Twice the learning rate trains about twice as far in as many steps; see docs/log.md.
LONGER = {"steps": 1400, "examples": 6000, "learning_rate": 4e-3}


def _goals() -> Iterator[Run]:
    """What is aimed at: the price of 3 and 5 times fewer transfers, after longer training."""
    yield _run("plain", "plain, 1400 steps", lambda_cache=0.0, **LONGER)
    plain = "plain, 700 steps"
    yield _run("plain", plain, lambda_cache=0.0, **LONG)
    yield _run("goals", "clipped, 700 steps", 1.0, plain=plain, lambda_cache=1.0, **LONG)


def _beyond() -> Iterator[Run]:
    """Ideas that are not in the paper, in the frontier's short runs."""
    yield _run("beyond", "own text alone", lambda_cache=0.0, **OWN)
    yield _run("beyond", "own text", 1.0, lambda_cache=1.0, **OWN)
    yield _run("beyond", "resident form", 1.0, lambda_cache=1.0, cache_loss="resident")


def _attention() -> Iterator[Run]:
    """Updates of attention beside those of the experts, with plain runs alike."""
    form = {"train": "router+experts+attention", "cache_loss": "resident"}
    plain = "plain, attention"
    yield _run("plain", plain, lambda_cache=0.0, **form)
    for strength in (1.0, 2.0):
        one = {"plain": plain, "lambda_cache": strength, **form}
        yield _run("attention", "attention, resident form", strength, **one)
    yield _run("plain", "plain, 1400 steps, attention", lambda_cache=0.0, **form, **LONGER)


def _ablations() -> Iterator[Run]:
    """One thing at a time around the default form at strength 1."""
    for gamma in (0.5, 0.8, 0.97):
        yield _run("ablations", "gamma", gamma, gamma=gamma, lambda_cache=1.0)
    for capacity in (0.125, 0.5):
        yield _run("ablations", "capacity", capacity, capacity=capacity, lambda_cache=1.0)
    routers = {"train": "router", "plain": "plain, routers only"}
    yield _run("plain", "plain, routers only", lambda_cache=0.0, train="router")
    yield _run("ablations", "routers only", lambda_cache=1.0, **routers)
    short = {"steps": 50, "examples": 400}
    yield _run("plain", "plain, 50 steps", lambda_cache=0.0, **short)
    few = {"plain": "plain, 50 steps", **short}
    yield _run("ablations", "50 steps, strength", 1.0, lambda_cache=1.0, **few)
    for examples in (100, 400):  # seen 16 and 4 times, where the others see each once
        plain = f"plain, {examples} examples"
        yield _run("plain", plain, lambda_cache=0.0, examples=examples)
        again = {"plain": plain, "examples": examples}
        yield _run("ablations", f"{examples} examples, strength", 1.0, lambda_cache=1.0, **again)


def all_runs(seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """All runs, part by part, seed by seed within: what an interrupted study has is whole."""
    parts = [_goals, _frontier, _beyond, _attention, _ablations]
    return [replace(run, seed=seed) for part in parts for seed in seeds for run in part()]
