"""Compare models and runs: which is held against which, and by how much, paired where possible."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from melinoe.config.likeness import differences
from melinoe.report.records import Measurements, Record
from melinoe.report.table import inline, signed
from melinoe.stats import Estimate, paired_difference, paired_ratio

STRATEGIES = ("base", "control", "fine-tuned", "fine-tuned + prefetch", "all resident")
# Estimate of a serve record -> the columns per prompt that it is the ratio of.
_COLUMNS = {"transfers_per_token": ("loads", "tokens"), "tokens_per_s": ("new_tokens", "seconds")}


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names without repetition: base, control and fine-tuned first, others as they came."""
    seen = dict.fromkeys(names)
    return [n for n in STRATEGIES if n in seen] + [n for n in seen if n not in STRATEGIES]


def differing_settings(found: Measurements) -> list[str] | None:
    """Name the settings, locality terms left out, that set the control apart; None: unknown."""
    settings = {r["model"]: r["settings"] for r in found.of("training") if r.get("settings")}
    if not {"control", "fine-tuned"} <= settings.keys():
        return None
    return [*differences(settings["fine-tuned"], settings["control"])]


def about_control(names: Sequence[str] | None, whose: str = "the") -> str:
    """Describe the control by the settings in which it differs: only a like-for-like one prices."""
    if names is None:
        return "a control of which no record says how it was trained"
    if names:
        return (
            f"a control that is not like for like (it differs in {', '.join(names)} too, so that "
            "no difference is the locality terms' alone)"
        )
    return f"{whose} control, the same training without the locality terms"


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
    if reference(found, "fine-tuned") == "base":
        return "Changes of perplexity are from base."
    return (
        "Changes of perplexity: the control's from base, the fine-tuned model's from "
        f"{about_control(differing_settings(found))}."
    )


def quality(found: Measurements, model: str, in_domain: bool) -> list[Record]:
    """Return the quality records of *model*, the last of each corpus."""
    records = [r for r in found.of("quality") if r["model"] == model]
    return list({r["domain"]: r for r in records if r["in_domain"] is in_domain}.values())


def perplexity(found: Measurements, model: str, in_domain: bool) -> Estimate | None:
    """Return the perplexity of *model*; over several corpora, their geometric mean."""
    records = quality(found, model, in_domain)
    return geometric_mean([Estimate.from_dict(r["perplexity"]) for r in records])


def domains(found: Measurements) -> list[tuple[str, bool]]:
    """Return the corpora, those trained on first: (name, whether it was trained on)."""
    seen = dict.fromkeys((r["domain"], r["in_domain"]) for r in found.of("quality"))
    return sorted(seen, key=lambda item: not item[1])


def geometric_mean(estimates: Sequence[Estimate]) -> Estimate | None:
    """Average positive estimates on the log scale, taken as independent; ``None`` for none."""
    if len(estimates) < 2:
        return estimates[0] if estimates else None
    count = len(estimates)
    centre = sum(math.log(item.mean) for item in estimates) / count
    down = math.hypot(*(math.log(item.mean / item.low) for item in estimates)) / count
    up = math.hypot(*(math.log(item.high / item.mean) for item in estimates)) / count
    total = sum(item.n for item in estimates)
    return Estimate(math.exp(centre), math.exp(centre - down), math.exp(centre + up), total)


def quotient(top: Record | None, bottom: Record | None, name: str) -> Estimate | None:
    """
    Divide estimate *name* of one run by that of another, paired by prompt.

    ``None`` where the runs do not list its sums for the same prompts, or the divisor is 0.
    """
    ours, theirs = ((record or {}).get("per_prompt") or {} for record in (top, bottom))
    columns: list[Any] = [run.get(one) or () for run in (ours, theirs) for one in _COLUMNS[name]]
    # Equal lengths in equal order: the same prompts, as far as records can say.
    same = ours.get("prompt_tokens") == theirs.get("prompt_tokens")
    if not (same and all(columns) and len({len(column) for column in columns}) == 1):
        return None
    above, above_by, below, below_by = columns
    return paired_ratio(above, below, above_by, below_by) if sum(below) > 0 else None


def factor(value: Record | None, base: Record | None, name: str, sign: str) -> str:
    """Write a ratio: ``÷ 2.20 [1.95, 2.51]`` says base over value, ``×`` value over base."""
    found = quotient(base, value, name) if sign == "÷" else quotient(value, base, name)
    return "" if found is None else f"{sign} {inline(found)}"


def increase(ours: Sequence[Record], theirs: Sequence[Record]) -> str:
    """
    Write how far our perplexity lies from theirs, paired by sequence: ``+1.8 % [+0.9, +2.6]``.

    Over several texts it is the geometric mean; empty where a text or its sequences are missing.
    """
    other = {record["domain"]: record.get("per_sequence") for record in theirs}
    pairs = [(one.get("per_sequence"), other.get(one["domain"])) for one in ours]
    factors = [
        paired_difference(a["nll"], b["nll"], a["tokens"], b["tokens"], transform=np.exp)
        for a, b in pairs
        if a and b and a["tokens"] == b["tokens"]
    ]
    mean = geometric_mean(factors)
    if mean is None or len(factors) < len(ours):
        return ""
    return signed(Estimate(mean.mean - 1, mean.low - 1, mean.high - 1, mean.n))
