"""Compare how two runs were trained, from the settings that their records hold."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from melinoe.config.finetuning import FinetuneSettings
from melinoe.errors import TrainingError

Settings = Mapping[str, Any]
_TERMS = {"lambda_rank", "lambda_match", "lambda_replay", "lambda_distill"}
# Of records of earlier versions: weights of locality terms, and other settings of terms with the
# weight by which each counts.
_OLD_LOCALITY = ("cache_prior", "lambda_reuse")
_OLD = {
    "lambda_distill": None, "replay_loss": "lambda_replay", "rank_reduce": "lambda_rank",
    "reference": "lambda_rank",
}  # fmt: skip


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
    if said.get("anchor") == "none":  # how an earlier version said it
        said = {k: v for k, v in said.items() if k != "anchor"} | {"lambda_rank": 0.0}
    said = {name: one for name, one in said.items() if one is not None or name in optional}
    try:
        return replace(FinetuneSettings().plain(), **said)
    except (TrainingError, TypeError, ValueError):
        return None


def for_locality(settings: Settings) -> bool:
    """Say whether a record's run had a locality term."""
    run = recorded(settings)
    old = any(settings.get(name) for name in _OLD_LOCALITY)
    return run is not None and (old or not run.is_control)


def differences(ours: Settings, theirs: Settings) -> dict[str, tuple[Any, Any]]:
    """
    Find what sets two runs apart beside the locality terms; nothing, for a like-for-like control.

    Args:
        ours: Settings of a run, as its record holds them.
        theirs: Those of the run that it is compared with. What only one record names is not
            compared, but for the weights of terms.

    Returns:
        Name to (our value, theirs), in order of names. Of a term that only one run has, the weight
        alone is named. Where a record's values cannot be read, all that differ are.
    """
    one, other = recorded(ours), recorded(theirs)
    if one is None or other is None:
        here, there = dict(ours), dict(theirs)
    else:
        here, there = (run.control().deciding() for run in (one, other))
        for name, weight in _OLD.items():
            if weight is None:  # a weight itself: 0 where a record does not name it
                here, there = (
                    side | {name: said.get(name) or 0.0}
                    for side, said in ((here, ours), (there, theirs))
                )
            elif here.get(weight) and there.get(weight):
                here, there = (
                    side | ({name: said[name]} if said.get(name) else {})
                    for side, said in ((here, ours), (there, theirs))
                )
    told = (ours.keys() & theirs.keys() | _TERMS) & here.keys() & there.keys()
    return {name: (here[name], there[name]) for name in sorted(told) if here[name] != there[name]}
