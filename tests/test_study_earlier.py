"""Which runs of the study differ in the locality terms alone, those of earlier versions too."""

from dataclasses import asdict, replace

import pytest

from benchmarks.study.earlier import differences, for_locality
from melinoe.config import FinetuneSettings


def settings(**changes):
    """A run with the cache term alone, and *changes*, some of an earlier version."""
    return asdict(replace(FinetuneSettings().plain(), lambda_cache=1.0)) | changes


def test_an_anchor_without_a_weight_and_terms_of_locality_set_nothing_apart():
    """As a control may be; a teacher does, whichever side has it."""
    assert differences(settings(), settings(rho=0.3, anchor="kl")) == {}
    assert [*differences(settings(), settings(lambda_match=10.0))] == ["lambda_match"]
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
