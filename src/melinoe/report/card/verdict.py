"""Say what was changed: by how much, at what price, or that no change was shown."""

from collections.abc import Mapping
from typing import Any

from melinoe.config.likeness import differences
from melinoe.report.amounts import inline, signed
from melinoe.report.card.tables import estimate, has_control
from melinoe.report.render import plain as literal
from melinoe.stats import Estimate

NO_CHANGE = "**No change shown**"
_POLICY = "lfu"


def verdict(outcome: Mapping[str, Any], settings: Mapping[str, Any], asks: bool) -> str:
    """
    Say what was measured of the aim: transfers and perplexity against the control, or the base.

    Args:
        outcome: Of a ``melinoe.json``.
        settings: Those of the run.
        asks: Whether there were locality terms whose price is not known.
    """
    if has_control(outcome):
        other, name = control_in_words(outcome, settings), "the control"
        change = outcome["change_from_control"]
    else:
        other, name, change = "its base", "the base", outcome["change"]
    slots, total = outcome["slots"], outcome["num_experts"]
    policies = change["reading"]["transfers_per_token"]
    policy = _POLICY if _POLICY in policies else next(iter(policies))
    by_size = dict(zip(policies[policy]["slots"], policies[policy]["ratio"], strict=True))
    ratio = estimate(by_size[slots]) if slots in by_size else None
    where = (
        f"{slots} of {total} experts per layer resident, {policy.upper()}, reading the same "
        "held-out text"
    )
    alike = has_control(outcome) and unlike(outcome, settings) == []
    said = f"{_moved(ratio, other, name, where)}{_paid(outcome, change, alike)}"
    if asks:
        said += " What the locality terms saved and cost was not measured."
    return said


def unlike(outcome: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str] | None:
    """
    Name what sets the control apart beside the locality terms; empty if nothing does.

    ``None`` where the record does not say how the control was trained.
    """
    theirs = (outcome.get("control_run") or {}).get("settings")
    return None if theirs is None else [*differences(settings, theirs)]


def control_in_words(outcome: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Say what kind of control the run was held against."""
    names = unlike(outcome, settings)
    if names is None:
        return "a control of which the record does not say how it was trained"
    if names:
        return (
            f"a control that is not like for like (it differs in {literal(', '.join(names))}, "
            "so that no difference is the locality terms' alone)"
        )
    return "its control, the same training without the locality terms"


def _moved(ratio: Estimate | None, other: str, name: str, where: str) -> str:
    """How many transfers it needs, as a sentence without its end."""
    if ratio is None:
        return f"Against {other}, this model needs **no transfers** ({where})"
    told = f"the transfers per token of {name} over this model's are {inline(ratio)} ({where})"
    if ratio.n < 2:
        return f"{NO_CHANGE} against {other}: {told}, on one prompt, which says nothing of the next"
    if ratio.low <= 1 <= ratio.high:
        return f"{NO_CHANGE} against {other}: {told}, and the interval contains 1"
    if ratio.mean < 1:
        return f"Against {other}, this model needs **more** transfers: {told}"
    return (
        f"Against {other}, this model needs **{inline(ratio)} times fewer** transfers per token "
        f"({where})"
    )


def _paid(outcome: Mapping[str, Any], change: Mapping[str, Any], priced: bool) -> str:
    """End the sentence with what became of perplexity in domain."""
    told = []
    for domain, value in change["perplexity"].items():
        if not outcome["after"]["perplexity"][domain]["in_domain"]:
            continue
        found, text = estimate(value), f"perplexity on held-out {literal(domain)}"
        if found.n < 2:
            told.append(f"{text} {signed(found)}, on one text, which says nothing of the next")
        elif found.low <= 0 <= found.high:
            told.append(f"{text} {signed(found)}, where the interval contains 0")
        elif found.mean > 0 and priced:
            told.append(f"at a price of **{signed(found)}** in {text}")
        else:
            told.append(f"{text} **{signed(found)}**")
    return "".join(f"; {one}" for one in told) + "."
