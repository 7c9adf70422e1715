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
    """One fine-tuning: *changes* to `BASE`; *examples* to train on."""

    group: str
    name: str
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    examples: int = EXAMPLES

    @property
    def settings(self) -> FinetuneSettings:
        """What `melinoe.finetune` is given."""
        return replace(BASE, seed=self.seed, **self.changes)

    @property
    def file(self) -> str:
        """Where its result lies, below the results directory."""
        return f"{self.group}/{self.name}-seed{self.seed}.json"


def _grid() -> Iterator[tuple[str, str, dict[str, Any]]]:
    yield "control", "control", {"lambda_cache": 0.0}
    for strength in (0.25, 0.5, 1.0, 2.0):
        yield "frontier", f"clipped-{strength}", {"lambda_cache": strength}
    for strength in (0.1, 0.25, 0.5):
        yield (
            "frontier",
            f"literal-{strength}",
            {"lambda_cache": strength, "cache_loss": "literal"},
        )
    for strength in (0.5, 1.0, 2.0):
        cache = {"lambda_cache": strength}
        yield "frontier", f"kl-{strength}", cache | {"anchor": "kl", "lambda_rank": 0.5}
        rank = cache | {"anchor": "rank"}
        # As a mean over pairs the term's gradient is some hundred times smaller than the sum's.
        yield "frontier", f"rank-mean-{strength}", rank | {"lambda_rank": 20.0}
        summed = {"lambda_rank": 0.1, "rank_reduce": "sum"}
        yield "frontier", f"rank-sum-{strength}", rank | summed


def all_runs() -> list[Run]:
    """All runs, seed by seed, so that an interrupted study has whole seeds first."""
    grid = list(_grid())
    return [Run(group, name, seed, changes) for seed in SEEDS for group, name, changes in grid]
