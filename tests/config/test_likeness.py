"""Which runs differ in the locality terms alone."""

from dataclasses import asdict, replace

import pytest

from melinoe.config import FinetuneSettings
from melinoe.config.likeness import differences, for_locality


def settings(**changes):
    """A run with the cache term alone, and *changes*."""
    plain = asdict(replace(FinetuneSettings().plain(), lambda_cache=1.0))
    now = {name: value for name, value in changes.items() if name in plain}
    return asdict(FinetuneSettings(**plain | now)) | changes  # some of an earlier version


@pytest.mark.parametrize(
    "changes",
    [
        {"lambda_cache": 0.0},
        {"gamma": 0.5, "capacity": 0.5, "cache_loss": "clipped"},
        {"log_every": 1, "save": "both", "gradient_checkpointing": True},
        {"rho": 0.3, "anchor": "kl"},  # of an earlier version; the anchor's weight is 0
        {"own_texts": 7},  # nothing is replayed
    ],
)
def test_what_leaves_a_control_like_for_like(changes):
    """The locality terms and their shape, what changes no weight, and what belongs to no term."""
    assert differences(settings(), settings(**changes)) == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lambda_match": 10.0}, ["lambda_match"]),
        (
            {"lambda_replay": 0.1},
            ["lambda_replay"],
        ),
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
    """An older record has no weight of hidden states: it matched none."""
    old = {name: value for name, value in settings().items() if name != "lambda_match"}
    assert differences(settings(), old) == {}
    assert differences(settings(lambda_match=1.0), old) == {"lambda_match": (1.0, 0.0)}


def test_a_run_is_for_locality_if_any_such_term_is_on():
    """Records without settings say nothing; those of earlier versions had other such terms."""
    off = settings(lambda_cache=0.0)
    assert for_locality(settings()) and not for_locality(off) and not for_locality({})
    assert for_locality(off | {"cache_prior": 0.2}) and for_locality(off | {"lambda_reuse": 0.5})


def test_records_of_earlier_versions_are_told_apart_by_what_they_trained():
    """Their words for no anchor, and a term that is gone: on one side only, it is no control."""
    old = settings() | {"anchor": "none", "lambda_rank": 0.1, "replay_loss": "kl"}
    assert differences(settings(), old) == {}
    taught = old | {"lambda_distill": 0.5}
    assert differences(old | {"lambda_distill": 0.25}, taught) == {"lambda_distill": (0.25, 0.5)}


@pytest.mark.parametrize(
    ("weight", "old"),
    [
        ("lambda_replay", {"replay_loss": "kl"}),
        ("lambda_replay", {"replay_batch_size": 4}),
        ("lambda_rank", {"rank_reduce": "sum"}),
        ("lambda_rank", {"reference": "pass"}),
        (None, {"weight_decay": 0.1}),
    ],
)
def test_a_setting_that_a_record_does_not_name_had_the_value_of_now(weight, old):
    """Beside a record of an earlier version that says another, it is another training."""
    (name,) = old
    ours = settings(**{weight: 0.1} if weight else {})
    assert [*differences(ours, ours | old)] == [name] == [*differences(ours | old, ours)]
    assert differences(ours, ours | {name: None}) == {}
    if weight:
        assert differences(settings(), settings() | old) == {}


@pytest.mark.parametrize("plain", [{"lambda_distill": 0.0}, {}])
def test_a_weight_of_an_earlier_version_sets_runs_apart(plain):
    """A run that was distilled has no control in one that was not, whether that says so or not."""
    ours, theirs = settings() | {"lambda_distill": 0.5}, settings() | plain
    assert [*differences(ours, theirs)] == ["lambda_distill"]
    assert differences(ours, ours) == {}
