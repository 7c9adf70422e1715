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
    compared with, seed by seed. With *own_text*, the base model writes anchor text to replay.
    """

    group: str
    family: str
    strength: float | None
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)
    control: str = "control"
    examples: int = EXAMPLES
    own_text: bool = False

    @property
    def name(self) -> str:
        """Family and strength."""
        return self.family if self.strength is None else f"{self.family} {self.strength:g}"

    @property
    def settings(self) -> FinetuneSettings:
        """What `melinoe.finetune` is given."""
        return replace(BASE, seed=self.seed, **self.changes)


def _run(group: str, family: str, strength: float | None = None, **changes: Any) -> Run:
    kept = {key: changes.pop(key) for key in ("control", "examples", "own_text") if key in changes}
    return Run(group, family, strength, 0, changes, **kept)


def _frontier() -> Iterator[Run]:
    """Forms of the cache term and of its anchor, each at several strengths."""
    yield _run("control", "control", lambda_cache=0.0)
    for strength in (0.25, 0.5, 1.0, 2.0):
        yield _run("frontier", "clipped", strength, lambda_cache=strength)
    for strength in (0.1, 0.25, 0.5):
        yield _run("frontier", "literal", strength, lambda_cache=strength, cache_loss="literal")
    for strength in (0.5, 1.0, 2.0):
        cache = {"lambda_cache": strength}
        yield _run("frontier", "with KL anchor", strength, anchor="kl", lambda_rank=0.5, **cache)
        # As a mean over pairs the term's gradient is some hundred times smaller than the sum's.
        yield _run("frontier", "with rank mean", strength, anchor="rank", lambda_rank=20.0, **cache)
        summed = {"anchor": "rank", "lambda_rank": 0.1, "rank_reduce": "sum"}
        yield _run("frontier", "with rank sum", strength, **summed, **cache)


def _beyond() -> Iterator[Run]:
    """Ideas that are not in the paper."""
    own = {"own_text": True, "lambda_replay": 1.0}
    yield _run("beyond", "own text alone", lambda_cache=0.0, **own)
    for strength in (0.5, 1.0, 2.0):
        cache = {"lambda_cache": strength}
        yield _run("beyond", "own text", strength, **own, **cache)
    for strength in (0.5, 1.0):
        cache = {"lambda_cache": strength}
        yield _run("beyond", "distilled", strength, lambda_distill=0.5, **cache)
        yield _run("beyond", "curriculum", strength, capacity_curriculum=0.5, **cache)
        yield _run("beyond", "resident form", strength, cache_loss="resident", **cache)
        yield _run(
            "beyond", "swap margin", 2 * strength, swap_margin=1.0, lambda_cache=2 * strength
        )
    for strength in (0.25, 0.5):
        yield _run("beyond", "reuse", strength, lambda_cache=0.0, lambda_reuse=strength)


def _ablations() -> Iterator[Run]:
    """One thing at a time around the default form at strength 1."""
    for gamma in (0.5, 0.8, 0.97):
        yield _run("ablations", "gamma", gamma, gamma=gamma, lambda_cache=1.0)
    for capacity in (0.125, 0.5):
        yield _run("ablations", "capacity", capacity, capacity=capacity, lambda_cache=1.0)
    yield _run("ablations", "gradient through the cache", cache_gradient=True, lambda_cache=1.0)
    routers = {"train": "router", "control": "control, routers only"}
    yield _run("control", "control, routers only", lambda_cache=0.0, train="router")
    yield _run("ablations", "routers only", lambda_cache=1.0, **routers)
    for steps in (50, 700):
        more = {"steps": steps, "examples": 8 * steps}
        name = f"control, {steps} steps"
        yield _run("control", name, lambda_cache=0.0, **more)
        yield _run(
            "ablations", f"{steps} steps, strength", 1.0, lambda_cache=1.0, control=name, **more
        )


def all_runs(seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """All runs, seed by seed, so that an interrupted study has whole seeds first."""
    grid = [*_frontier(), *_beyond(), *_ablations()]
    return [replace(run, seed=seed) for seed in seeds for run in grid]
