# ruff: noqa: RUF001  (the minus sign is meant: it is what a reader sees)
"""Two runs on the same prompts or texts: their ratio, paired where the records allow it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from melinoe.report.amounts import geometric_mean, inline, ratio, signed
from melinoe.report.schema import Record, read_estimate
from melinoe.stats import Estimate, paired_difference, paired_ratio

# Estimate of a serve record -> the columns per prompt that it is the ratio of.
_COLUMNS = {"transfers_per_token": ("loads", "tokens"), "tokens_per_s": ("new_tokens", "seconds")}


def quotient(top: Record | None, bottom: Record | None, name: str) -> Estimate | None:
    """
    Divide estimate *name* of one run by that of another; ``None`` where there is no ratio.

    Where both runs list, for the same prompts, the sums it is made of, the interval is a paired
    one over prompts; else the widest that the two intervals allow.
    """
    if top is None or bottom is None:
        return None
    columns = _columns(top, bottom, _COLUMNS.get(name, ()))
    if columns is not None:
        above, above_by, below, below_by = columns
        return paired_ratio(above, below, above_by, below_by) if sum(below) > 0 else None
    one, other = read_estimate(top.get(name)), read_estimate(bottom.get(name))
    return None if one is None or other is None else ratio(one, other)


def _columns(top: Record, bottom: Record, names: Sequence[str]) -> list[list[float]] | None:
    """Both runs' columns, if both have them for the same prompts."""
    ours, theirs = (record.get("per_prompt") or {} for record in (top, bottom))
    columns: list[Any] = [run.get(name) for run in (ours, theirs) for name in names]
    if not columns or not all(isinstance(column, list) and column for column in columns):
        return None
    # Equal lengths in equal order: the same prompts, as far as records can say.
    same = ours.get("prompt_tokens") == theirs.get("prompt_tokens")
    return columns if same and len({len(column) for column in columns}) == 1 else None


def factor(value: Record | None, base: Record | None, name: str, sign: str) -> str:
    """Write a ratio: ``÷ 2.20 [1.95, 2.51]`` says base over value, ``×`` value over base."""
    found = quotient(base, value, name) if sign == "÷" else quotient(value, base, name)
    return "" if found is None else f"{sign} {inline(found)}"


def increase(ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """
    Write how far our perplexity lies from theirs: ``+1.8 % [+0.9, +2.6]``.

    Paired by sequence where the records hold those; without, no interval is made up.

    Args:
        ours: Quality records of one model, one per text; of several texts the geometric mean,
            taken as independent of each other.
        theirs: Those of the other model.
    """
    other = {record["domain"]: record for record in theirs}
    pairs = [(one, other[one["domain"]]) for one in ours if one["domain"] in other]
    if not pairs or len(pairs) < len(ours):
        return ""
    paired = [item for one, two in pairs if (item := _over(one, two)) is not None]
    if len(paired) == len(pairs):
        over = paired[0] if len(paired) == 1 else geometric_mean(paired)
        return signed(Estimate(over.mean - 1, over.low - 1, over.high - 1, over.n))
    logs = [np.log(one["perplexity"]["mean"] / two["perplexity"]["mean"]) for one, two in pairs]
    return f"{100 * np.expm1(np.mean(logs)):+.1f} %".replace("-", "−")


def _over(one: Record, other: Record) -> Estimate | None:
    """Our perplexity divided by theirs, paired by sequence; ``None`` where a record lacks them."""
    ours, theirs = one.get("per_sequence"), other.get("per_sequence")
    if not ours or not theirs or ours["tokens"] != theirs["tokens"]:
        return None
    return paired_difference(
        ours["nll"], theirs["nll"], ours["tokens"], theirs["tokens"], transform=np.exp
    )
