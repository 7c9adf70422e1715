"""Whether two runs were trained alike but for the locality terms: only then is one a price."""

from collections.abc import Mapping
from typing import Any

# Weights of the locality terms, and what shapes those terms alone.
LOCALITY = ("lambda_cache", "cache_prior", "lambda_reuse")
_SHAPE = {
    *("capacity", "gamma", "cache_loss", "cache_gradient", "swap_margin", "capacity_curriculum"),
    *("layer_capacity", "layer_weight"),
}
# What changes no weight.
_FREE = {
    *("log_every", "eval_every", "save_every", "keep_checkpoints", "save", "report_to"),
    *("max_bad_steps", "gradient_checkpointing"),
}
_ANCHOR = {"anchor", "rho", "rank_reduce", "reference", "lambda_rank"}
_REPLAY = {"own_texts", "replay_loss", "replay_batch_size"}
# A record that does not name one was written before the term was there: it was off.
_TERMS = {"lambda_distill", "lambda_match", "lambda_replay"}

Settings = Mapping[str, Any]


def for_locality(settings: Settings) -> bool:
    """Whether a locality term was on; a prior that is left to the run is."""
    return any(_on(settings, name) for name in LOCALITY)


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """
    Name the settings beside the locality terms that two runs do not have in common.

    Args:
        ours: Settings of a run, as its record holds them.
        theirs: Those of the run that it is compared with. What only one record names is not
            compared, weights apart, nor the shape of a term that neither run has.

    Returns:
        Names in order; empty for a like-for-like control.
    """
    skip = {*LOCALITY, *_SHAPE, *_FREE}
    if not any(_anchored(one) for one in (ours, theirs)):
        skip |= _ANCHOR
    if not any(_on(one, "lambda_replay") for one in (ours, theirs)):
        skip |= _REPLAY
    odd = {name for name in (ours.keys() & theirs.keys()) - skip if ours[name] != theirs[name]}
    odd |= {name for name in _TERMS if (ours.get(name) or 0) != (theirs.get(name) or 0)}
    return sorted(odd)


def _on(settings: Settings, name: str) -> bool:
    return name in settings and settings[name] != 0


def _anchored(settings: Settings) -> bool:
    return _on(settings, "lambda_rank") and settings.get("anchor") != "none"
