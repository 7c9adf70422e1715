"""Compare how two runs were trained, from the settings that their records hold."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from melinoe.config.finetuning import FinetuneSettings
from melinoe.errors import TrainingError

Settings = Mapping[str, Any]
_TERMS = {"lambda_rank", "lambda_replay"}


def recorded(settings: Settings) -> FinetuneSettings | None:
    """
    Read the settings of a record; those that this release does not know are left out.

    A term that a record does not name was not there yet: it is off, whatever its default is now.
    ``None`` where a value is none that a run could use.
    """
    # What may not be absent now, but was: the run decided it, and the record does not say how.
    optional = {one.name for one in fields(FinetuneSettings) if one.default is None}
    known = {one.name for one in fields(FinetuneSettings)} & settings.keys()
    said = {
        name: settings[name] for name in known if settings[name] is not None or name in optional
    }
    try:
        return replace(FinetuneSettings().plain(), **said)
    except (TrainingError, TypeError, ValueError):
        return None


def for_locality(settings: Settings) -> bool:
    """Say whether a record's run had a locality term."""
    run = recorded(settings)
    return run is not None and not run.is_control


def differences(ours: Settings, theirs: Settings) -> dict[str, tuple[Any, Any]]:
    """
    Find what sets two runs apart beside the locality terms; nothing, for a like-for-like control.

    Gives name to (our value, theirs); of a term that only one run has, the weight alone. A setting
    that only one record names is not compared, unless it is the weight of a term. Where a record's
    values cannot be read, all that differ are named.
    """
    one, other = recorded(ours), recorded(theirs)
    if one is None or other is None:
        here, there = dict(ours), dict(theirs)
    else:
        here, there = (run.control().deciding() for run in (one, other))
    told = (ours.keys() & theirs.keys() | _TERMS) & here.keys() & there.keys()
    return {name: (here[name], there[name]) for name in sorted(told) if here[name] != there[name]}
