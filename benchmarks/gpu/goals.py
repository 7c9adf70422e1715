"""The goals that were set before anything was measured, each judged by the rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from plan import ENOUGH, OLMOE, PAPER_RATE


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with its target, what was measured, and whether it is met; None: not measured."""
    decode = [row for row in rows if row["section"] == "decode"]
    fast = [row for row in decode if row["engine"] == "fast" and row["batch"] == 1]
    resident = _first(decode, model=OLMOE, engine="fast, all resident", batch=1)
    paper = {
        row["engine"]: row["tokens_per_s"]
        for row in decode
        if row["engine"] == "fast" and row["batch"] == 1
        and row["model"] == OLMOE and row["experts"] == "int4"
        and row["miss_rate"] == PAPER_RATE
    }  # fmt: skip
    accelerate = _first(decode, engine="accelerate, experts on the CPU")
    slowest = max((r["step_s"] for r in fast if r["model"] == OLMOE), default=None)
    ratios = [
        reference["step_s"] / own["step_s"]
        for reference in decode
        if reference["engine"] == "reference"
        for own in fast
        if all(own[k] == reference[k] for k in ("model", "experts", "miss_rate"))
    ]
    decide = [row["decide_s"] / row["layers"] * 1e6 for row in rows if row["section"] == "split"]
    return [
        _goal("share of the roof at miss rates of .1 and above", 0.8, _least_share(fast)),
        _goal("tok/s, OLMoE, all resident", 300, resident and resident["tokens_per_s"]),
        _goal("tok/s, OLMoE, 60 experts a token, 4 bits", 200, paper.get("fast")),
        _goal("times accelerate's offload, at the worst miss rate", 3,
              accelerate["step_s"] / slowest if accelerate and slowest else None),
        _goal("times the reference engine, at the worst miss rate", 2, min(ratios, default=None)),
        _goal("us a layer to decide", 5, max(decide, default=None), below=True),
    ]  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Print the measurements in a few lines."""
    found = record["link"]
    lines = [f"{record['gpu'] or 'no GPU'}; " + ", ".join(f"{k} {v}" for k, v in _card(record))]
    known = [k for k in ("copy_engine", "kernel_reads", "device") if k in found]
    lines.append(
        "GB/s: " + (", ".join(f"{k} {found[k] / 1e9:.1f}" for k in known) or "not measured")
    )
    if found.get("kernel_share", 1) < ENOUGH:
        lines.append(
            f"kernels read at {found['kernel_share']:.0%} of the copy engine's rate, below "
            f"{ENOUGH:.0%}: bulk copies would be worth trying"
        )
    for row in record["result"]:
        if row["section"] == "decode":
            share = row.get("share_of_roof")
            lines.append(
                f"{row['model']:14} {row['engine']:40} {row['experts']:5} batch {row['batch']:<3}"
                f"miss {'-' if row['miss_rate'] is None else format(row['miss_rate'], '.2f'):5}"
                f"{row['tokens_per_s']:9.1f} tok/s"
                + (f"{share:7.0%} of roof" if share is not None else "")
            )
        elif row["section"] == "prefill":
            lines.append(
                f"{row['model']:14} {row['engine']:40} prompt of {row['tokens']} tokens: "
                f"{row['ttft_s'] * 1e3:.0f} ms"
            )
        elif row["section"] == "products":
            share = row["share_of_memory"]
            lines.append(
                f"{row['model']:14} {row['engine']:40} {row['experts']:5} {row['pairs']:3} pairs: "
                f"{row['bytes_per_s'] / 1e9:.0f} GB/s"
                + (f", {share:.0%} of memory's rate" if share is not None else "")
            )
        elif row["section"] == "smoke":
            said = str(row["said"]).strip().splitlines()
            lines.append(f"{'passed' if row['passed'] else 'FAILED'}: {row['step']}: {said[-1]}")
        elif row["section"] in ("tests", "failed capture"):
            lines.append(f"{row['section']}: {' '.join(row['last'])}")
        elif row["section"] == "profile":
            lines.append(f"{row['model']:14} one replay: {row['launches']} launches")
            lines += [
                f"  {k['us']:9.1f} us {k['count']:5} x {k['name']}" for k in row["kernels"][:8]
            ]
        elif row["section"] == "split":
            parts = ("decide_s", "copy_s", "compute_s", "rest_s")
            lines.append(
                f"{row['model']:14} a step in {row['experts']}, miss {row['miss_rate']}: "
                + ", ".join(f"{p[:-2]} {row[p] * 1e3:.2f} ms" for p in parts)
            )
    for goal in record["goals"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[goal["met"]]
        lines.append(f"{met}: {goal['goal']}: {goal['measured']} (goal {goal['target']})")
    lines += [f"not measured: {one['section']}: {one['reason']}" for one in record["not_measured"]]
    return "\n".join(lines)


def _card(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """Choose the facts of the card for its line."""
    card = next((row for row in record["result"] if row["section"] == "card"), {})
    smi = card.get("nvidia_smi", {})
    wanted = ("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current")
    facts = [(name, smi[name]) for name in wanted if name in smi]
    return [*facts, *((k, card[k]) for k in ("capability", "torch", "triton") if k in card)]


def _goal(name: str, target: float, measured: float | None, below: bool = False) -> dict[str, Any]:
    met = None
    if measured is not None:
        met = measured <= target if below else measured >= target
    return {"goal": name, "target": target, "measured": measured, "met": met}


def _least_share(rows: Iterable[dict[str, Any]]) -> float | None:
    shares = (row["share_of_roof"] for row in rows if row["miss_rate"] >= 0.1)
    return min((share for share in shares if share is not None), default=None)


def _first(rows: Iterable[dict[str, Any]], **want: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r.get(k) == v for k, v in want.items())), None)
