"""List what was paid and what it bought, below a model card's first sentence."""

from collections.abc import Mapping
from typing import Any

from melinoe.report.amounts import inline, plain, signed
from melinoe.report.card.tables import estimate, has_control
from melinoe.report.card.verdict import unlike
from melinoe.report.render import plain as literal
from melinoe.stats import Estimate

# The same text first: what a model writes itself may repeat, and flatter it.
_DOING = (("reading", "reading the same text"), ("writing", "writing its own"))
_WHERE = {"own": "in domain", "other": "out of domain"}
NOT_PRICED = (
    "The changes are from the base model, so they contain what plain fine-tuning on the same data "
    "does by itself. `melinoe finetune` measures what the locality terms do with `--against "
    "control` or `--max-ppl-increase`, which train a control too, or with `--against DIR`, which "
    "takes one that `--control` wrote."
)


def sentences(
    outcome: Mapping[str, Any], settings: Mapping[str, Any], price: Mapping[str, Any] | None
) -> list[str]:
    """
    The price out of domain and the saving over control and base, as items of a list.

    Args:
        outcome: Of a ``melinoe.json``; without a control, the changes from the base alone.
        settings: Those of the run.
        price: What a search for a price left there, if there was one.
    """
    if has_control(outcome):
        paid = [*_elsewhere(outcome, unlike(outcome, settings) == []), *_asked(price)]
    else:
        paid = by_the_search(price, base=False)
    return [*paid, *_saved(outcome), *_quality(outcome)]


def by_the_search(price: Mapping[str, Any] | None, base: bool = True) -> list[str]:
    """What a search for a price measured itself, over the *base* too; nothing without a search."""
    lines = []
    for name, value in ((price or {}).get("paid") or {}).items():
        lines.append(
            f"- Price: perplexity {_WHERE.get(name, literal(name))}, on held-out text that chose "
            f"nothing, **{signed(estimate(value))}** against the control{_doubt(value)}."
        )
    lines += _asked(price)
    fewer = (price or {}).get("times_fewer_than") or {}
    for policy, value in (fewer.get("reference") or {}).items():
        told = _times(estimate(value), "the control")
        if base and policy in (fewer.get("base") or {}):
            told += f"; {_times(estimate(fewer['base'][policy]), 'the base model')}"
        lines.append(
            f"- Saving with as many experts resident as it was trained for and {policy.upper()}, "
            f"reading the same text: {told}."
        )
    return lines


def explained(
    outcome: Mapping[str, Any],
    settings: Mapping[str, Any],
    metadata: Mapping[str, Any],
    asks: bool,
) -> str:
    """
    How the figures came about, and what they leave open.

    Args:
        outcome: Of a ``melinoe.json``.
        settings: Those of the run.
        metadata: All of it.
        asks: Whether there were locality terms whose price is not known.
    """
    control, data = has_control(outcome), metadata.get("data") or {}
    said = (
        f"{'All three' if control else 'Both'} models got the same held-out prompts and texts; "
        "changes are paired, intervals are 95 % bootstraps over prompts or texts. Hit rates and "
        "transfers are of completion tokens, counted by replaying what each model chose, the cache "
        "emptied before each prompt."
    )
    if control and unlike(outcome, settings) == []:
        said += (
            " The control was fine-tuned from the same base on the same data, in the same order, "
            "with the same steps, seed, teacher and replayed text, without the locality terms "
            "alone: what differs from it is their doing."
        )
    if data.get("chosen_by") and data.get("held_out"):
        said += (
            f" The strength of the cache term was chosen by {data['chosen_by']} of the "
            f"{data['held_out']} held-out examples; only the others were measured here."
        )
    if asks:
        said += f" {NOT_PRICED}"
    return said


def _elsewhere(outcome: Mapping[str, Any], priced: bool) -> list[str]:
    """Perplexity of other texts against the control: a price only if that is like for like."""
    change = outcome["change_from_control"]
    others = [
        f"{literal(domain)} **{signed(estimate(value))}**{_doubt(value)}"
        for domain, value in change["perplexity"].items()
        if not _is_own(outcome, domain)
    ]
    if not others:
        return []
    what = (
        "Price out of domain, against the control"
        if priced
        else ("Perplexity out of domain, against that control")
    )
    return [f"- {what}: {'; '.join(others)}."]


def _asked(price: Mapping[str, Any] | None) -> list[str]:
    """The bound, and whether the run kept it; nothing where none was asked for."""
    if not price or not price.get("bounds"):
        return []
    bounds = " and ".join(
        f"{100 * bound:g} % {_WHERE.get(name, literal(name))}"
        for name, bound in price["bounds"].items()
    )
    if not price.get("met"):
        verdict = "**not kept**"
    elif price.get("met_by_the_whole_interval"):
        verdict = "kept, by the whole interval"
    else:
        verdict = "kept by the mean, not by the whole interval"
    return [f"- Asked for was a price of at most {bounds}: {verdict}, as the search judged itself."]


def _saved(outcome: Mapping[str, Any]) -> list[str]:
    """Transfers with the slots that were trained for, over control and base."""
    slots, total = outcome["slots"], outcome["num_experts"]
    share = f"{slots} of {total} experts per layer resident"
    against = [("the base model", outcome["change"])]
    if has_control(outcome):
        against.insert(0, ("the control", outcome["change_from_control"]))
    lines = []
    for name, doing in _DOING:
        for policy in outcome["change"][name]["transfers_per_token"]:
            told = []
            for other, change in against:
                found = change[name]["transfers_per_token"][policy]
                by_size = dict(zip(found["slots"], found["ratio"], strict=True))
                if slots in by_size:
                    told.append(_times(estimate(by_size[slots]), other))
            if told:
                saving = f"- Saving with {share} and {policy.upper()}, {doing}: "
                lines.append(f"{saving}{'; '.join(told)}.")
    return lines


def _quality(outcome: Mapping[str, Any]) -> list[str]:
    return [
        f"- Perplexity on held-out {literal(domain)} changed by **{signed(estimate(value))}** from "
        f"the base model{_doubt(value)}."
        for domain, value in outcome["change"]["perplexity"].items()
        if _is_own(outcome, domain)
    ]


def _is_own(outcome: Mapping[str, Any], domain: str) -> bool:
    return bool(outcome["after"]["perplexity"][domain]["in_domain"])


def _doubt(value: Mapping[str, Any]) -> str:
    """What an interval leaves open."""
    found = estimate(value)
    if found.n < 2:
        return ", though one text alone shows nothing about the next"
    if found.low <= 0 <= found.high:
        return ", where the interval contains 0: no difference is shown"
    return ""


def _times(ratio: Estimate, other: str) -> str:
    """The other model's transfers over ours, as a clause."""
    if ratio.n < 2:
        return (
            f"transfers per token of {other} over this one's are {plain(ratio.mean)}, but one "
            "prompt alone shows nothing about the next"
        )
    if ratio.low <= 1 <= ratio.high:
        return (
            f"transfers per token of {other} over this one's are {inline(ratio)}, and the interval "
            "contains 1: no difference is shown"
        )
    if ratio.mean < 1:
        return f"**more** transfers per token than {other} (theirs over ours {inline(ratio)})"
    return f"**{inline(ratio)} times fewer** transfers per token than {other}"
