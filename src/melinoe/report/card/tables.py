# ruff: noqa: RUF001  (signs such as × and − are meant: they are what a reader sees)
"""The tables of a model card: perplexity, and locality while writing and while reading."""

from collections.abc import Mapping
from typing import Any

from melinoe.report.amounts import inline, plain, signed
from melinoe.report.render import markdown
from melinoe.report.tables import Cell, Table, cell
from melinoe.stats import Estimate

OWN = "What each model chose while it wrote its own greedy completions:"
GIVEN = (
    "And while it read the held-out completions, the same tokens for all, so that a model that "
    "repeats itself gains nothing by it:"
)


def all_of(outcome: Mapping[str, Any], for_locality: bool) -> list[str]:
    """
    Write the three tables, and what stands above the last two.

    Args:
        outcome: Of a ``melinoe.json``.
        for_locality: Whether the model was trained for a cache of the size that is named.
    """
    writing, reading = (
        markdown(_locality(outcome, name, for_locality)) for name in ("writing", "reading")
    )
    return [markdown(_quality(outcome)), OWN, writing, GIVEN, reading]


def estimate(value: Mapping[str, Any]) -> Estimate:
    """An estimate of a record."""
    return Estimate.from_dict(dict(value))


def has_control(outcome: Mapping[str, Any]) -> bool:
    """Whether the control was measured beside base and result."""
    return bool(outcome.get("control") and outcome.get("change_from_control"))


def _sides(outcome: Mapping[str, Any]) -> list[str]:
    """The models in the order of the columns."""
    return ["before", *(["control"] if has_control(outcome) else []), "after"]


def _changes(outcome: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Against the base and, where it was measured, against the control."""
    change, over = outcome["change"], outcome.get("change_from_control")
    return [change, over] if over and has_control(outcome) else [change]


def _columns(outcome: Mapping[str, Any], name: str) -> list[str]:
    changes = ["from before", "from control"] if has_control(outcome) else ["change"]
    return [name, *_sides(outcome), *changes]


def _quality(outcome: Mapping[str, Any]) -> Table:
    rows = []
    for domain, value in outcome["after"]["perplexity"].items():
        where = "in domain" if value["in_domain"] else "out of domain"
        sides = [outcome[side]["perplexity"][domain]["perplexity"] for side in _sides(outcome)]
        rows.append(
            [
                Cell(f"{domain} ({where})"),
                *(cell(estimate(one), digits=4) for one in sides),
                *(Cell(signed(estimate(one["perplexity"][domain]))) for one in _changes(outcome)),
            ]
        )
    return Table("quality", "Perplexity", _columns(outcome, "perplexity"), rows)


def _locality(outcome: Mapping[str, Any], name: str, for_locality: bool) -> Table:
    """Locality of each model, of what the models wrote or of what they read."""
    sides = [outcome[side][name] for side in _sides(outcome)]
    changes, total = [one[name] for one in _changes(outcome)], outcome["num_experts"]
    nothing = [Cell("")] * len(changes)
    rows = []
    means = [cell(estimate(side["experts_per_sequence_mean"])) for side in sides]
    fewer = [inline(estimate(one["experts_per_sequence"])).replace("-", "−") for one in changes]
    rows.append([Cell("experts per sequence, mean layer"), *means, *map(Cell, fewer)])
    reuse = [cell(estimate(side["reuse"]), "%") for side in sides]
    rows.append([Cell("experts reused from the token before"), *reuse, *nothing])
    whole = [Cell(f"{plain(s['distinct_experts'])} of {total}") for s in sides]
    rows.append([Cell("experts used over all prompts, mean layer"), *whole, *nothing])
    for policy, found in changes[0]["transfers_per_token"].items():
        for at, size in enumerate(found["slots"]):
            label = f"{policy.upper()}, {size} slots"
            label += " (trained for)" if for_locality and size == outcome["slots"] else ""
            moved = [_at(side, policy, "transfers_per_token", size) for side in sides]
            # Both changes leave out the same sizes: those at which the tuned model loads nothing.
            ratios = [one["transfers_per_token"][policy]["ratio"][at] for one in changes]
            times = [Cell(f"÷ {inline(estimate(ratio))}") for ratio in ratios]
            rows.append([Cell(f"transfers per token, {label}"), *moved, *times])
            hits = [_at(side, policy, "hit_rate", size, "%") for side in sides]
            rows.append([Cell(f"hit rate, {label}"), *hits, *nothing])
    return Table(name, "Locality", _columns(outcome, name), rows)


def _at(side: Mapping[str, Any], policy: str, name: str, size: int, unit: str = "") -> Cell:
    cache = side["caches"][policy]
    return cell(estimate(cache[name][cache["slots"].index(size)]), unit)
