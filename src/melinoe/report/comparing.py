# ruff: noqa: RUF001  (the minus sign is meant: it is what a reader sees)
"""
Compare models and runs: which is held against which, and by how much, paired where records allow.

Only a control that is like for like sets a price: the same run without the locality terms.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from melinoe.config.likeness import differences
from melinoe.report.amounts import geometric_mean, inline, ratio, signed
from melinoe.report.records import Measurements, Record, estimate, read_estimate
from melinoe.stats import Estimate, paired_difference, paired_ratio

STRATEGIES = ("base", "control", "fine-tuned", "fine-tuned + prefetch", "all resident")
# Estimate of a serve record -> the columns per prompt that it is the ratio of.
_COLUMNS = {"transfers_per_token": ("loads", "tokens"), "tokens_per_s": ("new_tokens", "seconds")}


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names without repetition: base, control and fine-tuned first, others as they came."""
    seen = dict.fromkeys(names)
    return [n for n in STRATEGIES if n in seen] + [n for n in seen if n not in STRATEGIES]


def unlike_control(found: Measurements) -> list[str] | None:
    """
    Name the settings that set the control apart beside the locality terms; empty if none does.

    ``None`` where the records do not say how both were trained.
    """
    settings = {r["model"]: r["settings"] for r in found.of("training") if r.get("settings")}
    if not {"control", "fine-tuned"} <= settings.keys():
        return None
    return [*differences(settings["fine-tuned"], settings["control"])]


def about_control(names: Sequence[str] | None) -> str:
    """Describe the control by what `unlike_control` gave."""
    if names is None:
        return "a control of which the records do not say how it was trained"
    if names:
        return (
            f"a control that is not like for like (it differs in {', '.join(names)} too, so that "
            "no difference is the locality terms' alone)"
        )
    return "the control, the same training without the locality terms"


def reference(found: Measurements, model: str) -> str | None:
    """
    Name the model that a model's perplexity is compared with; ``None`` for the base.

    The fine-tuned model is compared with the control where there is one: the base never saw the
    text that both trained on, so that any fine-tuning on it is better there.
    """
    if model == "base":
        return None
    measured = {record["model"] for record in found.of("quality")}
    return "control" if model == "fine-tuned" and "control" in measured else "base"


def quality_note(found: Measurements) -> str:
    """Say which model the changes of perplexity in a table are from."""
    if not {"control", "fine-tuned"} <= {record["model"] for record in found.of("quality")}:
        return "Changes of perplexity are from base."
    return (
        "Changes of perplexity: the control's from base, the fine-tuned model's from "
        f"{about_control(unlike_control(found))}."
    )


def quality(found: Measurements, model: str, in_domain: bool) -> list[Record]:
    """Return the quality records of *model*, the last of each corpus."""
    records = [r for r in found.of("quality") if r["model"] == model]
    return list({r["domain"]: r for r in records if r["in_domain"] is in_domain}.values())


def perplexity(found: Measurements, model: str, in_domain: bool) -> Estimate | None:
    """Return the perplexity of *model*; over several corpora, their geometric mean."""
    records = quality(found, model, in_domain)
    estimates = [one for r in records if (one := estimate(r, "perplexity")) is not None]
    if len(estimates) == 1:
        return estimates[0]
    return geometric_mean(estimates) if estimates else None


def domains(found: Measurements) -> list[tuple[str, bool]]:
    """Return the corpora, those trained on first: (name, whether it was trained on)."""
    seen = dict.fromkeys((r["domain"], r["in_domain"]) for r in found.of("quality"))
    return sorted(seen, key=lambda item: not item[1])


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
    one, other = estimate(top, name), estimate(bottom, name)
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
        return signed(mean_increase(paired))
    logs = [np.log(one["perplexity"]["mean"] / two["perplexity"]["mean"]) for one, two in pairs]
    return f"{100 * np.expm1(np.mean(logs)):+.1f} %".replace("-", "−")


def mean_increase(factors: Sequence[Estimate]) -> Estimate:
    """Average factors, as 1.02 for 2 % more, and return the mean increase: 0.02."""
    mean = factors[0] if len(factors) == 1 else geometric_mean(factors)
    return Estimate(mean.mean - 1, mean.low - 1, mean.high - 1, mean.n)


def _over(one: Record, other: Record) -> Estimate | None:
    """Our perplexity divided by theirs, paired by sequence; ``None`` where a record lacks them."""
    ours, theirs = one.get("per_sequence"), other.get("per_sequence")
    if not ours or not theirs or ours["tokens"] != theirs["tokens"]:
        return None
    return paired_difference(
        ours["nll"], theirs["nll"], ours["tokens"], theirs["tokens"], transform=np.exp
    )


def increase_over_control(found: Measurements, in_domain: bool) -> Estimate | None:
    """Return fine-tuned over control minus 1, paired, where every corpus' record holds it."""
    records = quality(found, "fine-tuned", in_domain)
    over = [read_estimate(record.get("increase_over_control")) for record in records]
    factors = [Estimate(1 + i.mean, 1 + i.low, 1 + i.high, i.n) for i in over if i is not None]
    return mean_increase(factors) if factors and len(factors) == len(records) else None
