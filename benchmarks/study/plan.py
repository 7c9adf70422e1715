"""
The runs of the study: what is varied, around which settings, with which seeds.

Every run is one fine-tuning of the shipped model on GSM8K, judged by `judge`. A run's name says
what differs from `BASE`; its control is the run of group ``control`` with the same seed.
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
    anchor="none",
    lambda_rank=0.0,
)


@dataclass(frozen=True)
class Run:
    """
    One fine-tuning: *changes* to `BASE`; *examples* to train on.

    Runs of one *family* differ in *strength* alone; *control* is the name of the run that each is
    compared with, seed by seed.
    """

    group: str
    family: str
    strength: float | None
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    control: str = "control"
    examples: int = EXAMPLES

    @property
    def name(self) -> str:
        """Family and strength."""
        return self.family if self.strength is None else f"{self.family} {self.strength:g}"

    @property
    def settings(self) -> FinetuneSettings:
        """What `melinoe.finetune` is given."""
        return replace(BASE, seed=self.seed, **self.changes)


Entry = tuple[str, str, float | None, dict[str, Any]]


def _grid() -> Iterator[Entry]:
    yield "control", "control", None, {"lambda_cache": 0.0}
    for strength in (0.25, 0.5, 1.0, 2.0):
        yield "frontier", "clipped", strength, {"lambda_cache": strength}
    for strength in (0.1, 0.25, 0.5):
        literal = {"lambda_cache": strength, "cache_loss": "literal"}
        yield "frontier", "literal", strength, literal
    for strength in (0.5, 1.0, 2.0):
        cache = {"lambda_cache": strength}
        kl = cache | {"anchor": "kl", "lambda_rank": 0.5}
        # As a mean over pairs the term's gradient is some hundred times smaller than the sum's.
        mean = cache | {"anchor": "rank", "lambda_rank": 20.0}
        summed = cache | {"anchor": "rank", "lambda_rank": 0.1, "rank_reduce": "sum"}
        yield "frontier", "KL anchor 0.5", strength, kl
        yield "frontier", "rank mean 20", strength, mean
        yield "frontier", "rank sum 0.1", strength, summed


def all_runs() -> list[Run]:
    """All runs, seed by seed, so that an interrupted study has whole seeds first."""
    grid = list(_grid())
    return [
        Run(group, family, strength, seed, changes)
        for seed in SEEDS
        for group, family, strength, changes in grid
    ]
