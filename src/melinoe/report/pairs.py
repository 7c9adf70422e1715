"""Two runs on the same prompts or texts: their ratio, paired where the records allow it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from melinoe.errors import DataError
from melinoe.report.amounts import geometric_mean, inline, ratio, signed
from melinoe.report.schema import Record, read_estimate
from melinoe.stats import Estimate, paired_difference, paired_ratio

# Estimate of a serve record -> the columns per prompt that it is the ratio of.
_COLUMNS = {"transfers_per_token": ("loads", "tokens"), "tokens_per_s": ("new_tokens", "seconds")}


def times_text(top: Record | None, bottom: Record | None, name: str, sign: str) -> str:
    """
    Write how many times *name* of one run is that of another: ``÷ 2.20 [1.95, 2.51]``.

    Paired by prompt where both records hold their prompts' own counts and the prompts are the
    same; else the widest range that the two intervals allow. Empty where there is no ratio.
    """
    found = times(top, bottom, name)
    return "" if found is None else f"{sign} {inline(found)}"


def times(top: Record | None, bottom: Record | None, name: str) -> Estimate | None:
    """Estimate *name* of *top* over that of *bottom*; ``None`` where there is no ratio."""
    if top is None or bottom is None:
        return None
    first, second = read_estimate(top.get(name)), read_estimate(bottom.get(name))
    if first is None or second is None:
        return None
    ours, theirs = top.get("per_prompt"), bottom.get("per_prompt")
    if name in _COLUMNS and ours and theirs and _same_prompts(ours, theirs, _COLUMNS[name]):
        above, below = _COLUMNS[name]
        try:
            return paired_ratio(ours[above], theirs[above], ours[below], theirs[below])
        except DataError:  # nothing was moved, or nothing generated
            return None
    return ratio(first, second)


def _same_prompts(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], columns: tuple[str, ...]
) -> bool:
    if any(name not in side for side in (ours, theirs) for name in columns):
        return False
    # Prompts of equal lengths in equal order: the same ones, as far as a record can say.
    return bool(ours.get("prompt_tokens")) and ours["prompt_tokens"] == theirs.get("prompt_tokens")


def increase_text(ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """
    Write how far our perplexity lies from theirs: ``+1.8 % [+0.9, +2.6]``.

    Args:
        ours: Quality records of one model, one per text; of several texts the geometric mean.
        theirs: Those of the other.
    """
    pairs = _by_domain(ours, theirs)
    if not pairs:
        return ""
    paired = [_increase(one, other) for one, other in pairs]
    if all(item is not None for item in paired):
        factor = geometric_mean([item for item in paired if item is not None])
        return signed(Estimate(factor.mean - 1, factor.low - 1, factor.high - 1, factor.n))
    product = 1.0
    for one, other in pairs:
        product *= one["perplexity"]["mean"] / other["perplexity"]["mean"]
    change = 100 * (product ** (1 / len(pairs)) - 1)
    return f"{change:+.1f} %".replace("-", "−")  # noqa: RUF001


def _by_domain(ours: Sequence[Record], theirs: Sequence[Record]) -> list[tuple[Record, Record]]:
    other = {record["domain"]: record for record in theirs}
    pairs = {r["domain"]: (r, other[r["domain"]]) for r in ours if r["domain"] in other}
    return list(pairs.values())


def _increase(one: Record, other: Record) -> Estimate | None:
    """Our perplexity over theirs, paired by sequence; ``None`` where a record lacks them."""
    ours, theirs = one.get("per_sequence"), other.get("per_sequence")
    if not ours or not theirs or ours["tokens"] != theirs["tokens"]:
        return None
    return paired_difference(
        ours["nll"], theirs["nll"], ours["tokens"], theirs["tokens"], transform=np.exp
    )

