"""In how many cases one thing is shown to load less than another: what the tables say in short."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from caches import POLICIES, PREFETCHES, Cells, minus, sizes
from choices import POLICY

from melinoe.stats import Estimate

CAUSAL = tuple(policy for policy in POLICIES if policy != "belady")


def counts(found: list[Cells], split: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    A row for each comparison; a case is one model, domain, number of slots and, of prefetches,
    policy that knows no future.
    """
    rows = []
    for policy in POLICIES:
        if policy != POLICY:
            against = f"{POLICY}, on demand"
            rows.append(row(policy, against, against_lfu(found, policy)))
    for name in PREFETCHES[1:]:
        rows.append(row(f"{name}, all copies", "no prefetch", against_none(found, name, "copies")))
        rows.append(
            row(f"{name}, on demand alone", "no prefetch", against_none(found, name, "loads"))
        )
    rows.append(row("slots by layer", "uniform", (one["difference"] for one in split)))
    return rows


def against_lfu(found: list[Cells], policy: str) -> Iterable[Estimate]:
    """Differences of a policy from LFU, without prefetch."""
    for cells in found:
        for slots in sizes(cells):
            yield minus(cells[slots, policy, "none"], cells[slots, POLICY, "none"])


def against_none(found: list[Cells], name: str, what: str) -> Iterable[Estimate]:
    """Differences of a prefetch from none, under every policy that knows no future."""
    for cells in found:
        for slots in sizes(cells):
            for policy in CAUSAL:
                yield minus(cells[slots, policy, name], cells[slots, policy, "none"], what)


def row(what: str, against: str, differences: Iterable[Estimate]) -> dict[str, Any]:
    """Count differences whose interval lies on one side of 0."""
    all_of_them = list(differences)
    fewer = sum(one.high < 0 for one in all_of_them)
    more = sum(one.low > 0 for one in all_of_them)
    return {
        "what": what,
        "against": against,
        "cases": len(all_of_them),
        "fewer loads": fewer,
        "more loads": more,
        "not shown": len(all_of_them) - fewer - more,
    }
