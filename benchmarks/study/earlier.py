"""
Compare the settings of the study's runs, some of which an earlier version of Melinoe made.

Settings that are gone count as they did then; every other one is compared by `melinoe.config`.
"""

from melinoe.config import likeness

# The weight by which each counts, None for one that always does, and the value that holds now.
GONE = {
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


def for_locality(settings):
    """Whether a run had a locality term, the prior and the reuse loss of earlier versions too."""
    old = any(settings.get(name) for name in ("cache_prior", "lambda_reuse"))
    return bool(settings) and (old or likeness.for_locality(settings))


def differences(ours, theirs):
    """What sets two runs apart beside the locality terms: name to (our value, theirs)."""
    # "none" is how an earlier version said that no anchor weighs.
    ours, theirs = (
        {**said, "lambda_rank": 0.0} if said.get("anchor") == "none" else said
        for said in (ours, theirs)
    )
    found = likeness.differences(ours, theirs)
    for name, (weight, now) in GONE.items():
        one, other = (now if said.get(name) is None else said[name] for said in (ours, theirs))
        if one != other and (weight is None or (ours.get(weight) and theirs.get(weight))):
            found[name] = (one, other)
    return found
