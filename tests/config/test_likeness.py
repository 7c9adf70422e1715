"""Which runs differ in the locality terms alone."""

from dataclasses import asdict, replace

import pytest

from melinoe.config import FinetuneSettings
from melinoe.config.likeness import differences, for_locality


def settings(**changes):
    """A run with the cache term alone, and *changes*."""
    plain = asdict(replace(FinetuneSettings().plain(), lambda_cache=1.0))
    return asdict(FinetuneSettings(**plain | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"lambda_cache": 0.0},
        {"gamma": 0.5, "capacity": 0.5, "cache_loss": "clipped"},
        {"log_every": 1, "save": "both", "gradient_checkpointing": True},
        {"rho": 0.3},  # the weight of rank matching is 0
        {"own_texts": 7},  # nothing is replayed
    ],
)
def test_what_leaves_a_control_like_for_like(changes):
    """The locality terms and their shape, what changes no weight, and what belongs to no term."""
    assert differences(settings(), settings(**changes)) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lambda_replay": 0.1}, ["lambda_replay"]),
        ({"lambda_rank": 0.1}, ["lambda_rank"]),
        ({"seed": 1, "steps": 3}, ["seed", "steps"]),
        ({"train": "router"}, ["train"]),
    ],
)
def test_what_makes_a_control_unlike(changes, named):
    """A teacher, replay, an anchor, or another training; whichever side has it."""
    assert named == [*differences(settings(), settings(**changes))]
    assert named == [*differences(settings(**changes), settings())]


def test_a_term_that_a_record_does_not_name_was_off():
    """A record without the weight of replay: nothing was replayed."""
    old = {name: value for name, value in settings().items() if name != "lambda_replay"}
    assert differences(settings(), old) == {}
    assert differences(settings(lambda_replay=1.0), old) == {"lambda_replay": (1.0, 0.0)}


def test_a_run_is_for_locality_if_any_such_term_is_on():
    """Records without settings say nothing."""
    off = settings(lambda_cache=0.0)
    assert for_locality(settings()) and not for_locality(off) and not for_locality({})
    assert for_locality(settings(lambda_cache=0.0, lambda_concentration=0.5))
