"""
The evidence's questions, answered for each model and domain out of its own tables.

`run.py` writes the answers with its tables; alone this writes them anew from a file of them:

    python benchmarks/evidence/answers.py [benchmarks/results/evidence.jsonl]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "evidence-answers"
QUARTER, POLICY = 8, "lfu"
Rows = Sequence[Mapping[str, Any]]


def answers(records: Rows) -> dict[str, Any]:
    """
    A record with a row for each question and a column for each model and domain.

    Args:
        records: The tables ``evidence-policies``, ``-prefetch``, ``-allocation``, ``-choice``.
    """
    of = {record["benchmark"].removeprefix("evidence-"): record["result"] for record in records}
    cases = [row for row in of["policies"] if row["slots"] == QUARTER]
    columns: list[dict[str, Any]] = []
    for case in cases:

        def here(name: str, case: Mapping[str, Any] = case) -> Rows:
            return [r for r in of[name] if all(r[k] == case[k] for k in ("model", "domain"))]

        columns.append(_policies(case) | _prefetches(here("prefetch")) | _others(here))
    titles = [f"{case['model']}, {case['domain']}" for case in cases]
    return {
        "benchmark": NAME,
        "title": f"The questions, with {QUARTER} slots of each layer",
        "result": [
            {"question": question}
            | {t: column[question] for t, column in zip(titles, columns, strict=True)}
            for question in columns[0]
        ],
        "notes": [
            "Transfers: experts copied a token. Read off the tables below, whose notes hold here "
            "too; which policy and prefetch is best was chosen on these very texts."
        ],
    }


def _policies(case: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "the policy that can serve with the fewest transfers": case["fewest"],
        "its transfers minus LFU's": case["it minus lfu"],
        "its transfers over Belady's": case["it times belady"],
        "LFU's transfers over Belady's": case["lfu times belady"],
    }


def _prefetches(rows: Rows) -> dict[str, Any]:
    ahead = [row for row in rows if row["prefetch"] != "none"]
    fewest = min(ahead, key=lambda row: row["all copies, minus none"]["mean"])
    waits = min(ahead, key=lambda row: row["on demand, minus none"]["mean"])
    return {
        "the prefetch with the fewest copies in all": fewest["prefetch"],
        "its copies in all, minus none's": fewest["all copies, minus none"],
        "the prefetch that leaves the fewest to wait for": waits["prefetch"],
        "its transfers on demand, minus none's": waits["on demand, minus none"],
        "and its copies in all, minus none's": waits["all copies, minus none"],
    }


def _others(here: Any) -> dict[str, Any]:
    (split,) = (
        row for row in here("allocation") if (row["slots"], row["policy"]) == (QUARTER, POLICY)
    )
    found = {"slots by layer, LFU: transfers minus uniform": split["difference"]}
    for row in here("choice"):
        found[f"{row['choice']}: transfers (%)"] = row["their_change_percent"]
        found[f"{row['choice']}: perplexity (%)"] = row["its_increase_percent"]
    return found


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/evidence.jsonl"
    path = Path(name)
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    records = [record for record in records if record["benchmark"] != NAME]
    about = {key: records[0][key] for key in ("settings", "machine")}
    temporary = path.with_name(f".{path.name}.writing")
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    lines.append(json.dumps({**answers(records), **about}, ensure_ascii=False))
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
