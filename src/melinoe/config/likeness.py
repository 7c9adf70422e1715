"""Compare how two runs were trained, from the settings that their records hold."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from melinoe.config.finetuning import FinetuneSettings
from melinoe.errors import TrainingError

Settings = Mapping[str, Any]
_TERMS = {"lambda_rank", "lambda_replay"}
# Settings of earlier versions: the weight by which each counts, None for one that always does, and
# the value that holds now. Those of locality terms may differ between a run and its control.
_GONE: dict[str, tuple[str | None, Any]] = {
    "lambda_distill": (None, 0.0),
    "lambda_match": (None, 0.0),
    "anchor": ("lambda_rank", "rank"),
    "weight_decay": (None, 0.0),
    "keep": (None, "last"),
    "packing": (None, False),
    "replay_loss": ("lambda_replay", "nll"),
    "replay_batch_size": ("lambda_replay", 2),
    "rank_reduce": ("lambda_rank", "mean"),
    "reference": ("lambda_rank", "router"),
}
_GONE_LOCALITY: dict[str, tuple[str | None, Any]] = {
    "cache_prior": (None, 0.0),
    "lambda_reuse": (None, 0.0),
    "cache_gradient": ("lambda_cache", False),
    "swap_margin": ("lambda_cache", None),
    "capacity_curriculum": ("lambda_cache", 0.0),
    "layer_capacity": ("lambda_cache", None),
    "layer_weight": ("lambda_cache", None),
}


def recorded(settings: Settings) -> FinetuneSettings | None:
    """
    Read the settings of a record; those that this release does not know are left out.

    A term that a record does not name was not there yet: it is off, whatever its default is now.
    ``None`` where a value is none that a run could use.
    """
    # What may not be absent now, but was: the run decided it, and the record does not say how.
    optional = {one.name for one in fields(FinetuneSettings) if one.default is None}
    known = {one.name for one in fields(FinetuneSettings)} & settings.keys()
    said = {name: settings[name] for name in known}
    said = {name: one for name, one in said.items() if one is not None or name in optional}
    try:
        return replace(FinetuneSettings().plain(), **said)
    except (TrainingError, TypeError, ValueError):
        return None


def for_locality(settings: Settings) -> bool:
    """Say whether a record's run had a locality term."""
    run = recorded(settings)
    old = any(settings.get(name) for name in ("cache_prior", "lambda_reuse"))
    return run is not None and (old or not run.is_control)


def gone_settings(settings: Settings) -> dict[str, Any]:
    """Find the settings, name to value, that a run was decided by and this release lacks."""
    return {
        name: settings[name]
        for name, (weight, now) in (_GONE | _GONE_LOCALITY).items()
        if settings.get(name) not in (None, now) and (weight is None or settings.get(weight))
    }


def differences(ours: Settings, theirs: Settings) -> dict[str, tuple[Any, Any]]:
    """
    Find what sets two runs apart beside the locality terms; nothing, for a like-for-like control.

    Gives name to (our value, theirs); of a term that only one run has, the weight alone. A setting
    that only one record names is not compared, unless it is the weight of a term. Where a record's
    values cannot be read, all that differ are named.
    """
    # "none" is how an earlier version said that no anchor weighs.
    ours, theirs = (
        {**said, "lambda_rank": 0.0} if said.get("anchor") == "none" else said
        for said in (ours, theirs)
    )
    one, other = recorded(ours), recorded(theirs)
    if one is None or other is None:
        here, there = dict(ours), dict(theirs)
    else:
        here, there = (run.control().deciding() for run in (one, other))
        for name, (weight, now) in _GONE.items():
            if weight is None or (here.get(weight) and there.get(weight)):
                here, there = (
                    side | {name: now if said.get(name) is None else said[name]}
                    for side, said in ((here, ours), (there, theirs))
                )
    told = (ours.keys() & theirs.keys() | _TERMS | _GONE.keys()) & here.keys() & there.keys()
    return {name: (here[name], there[name]) for name in sorted(told) if here[name] != there[name]}
