"""
How near is the device engine to what link and memory allow, and how far ahead of the others?

Bad news would be: below 80 % of the roof max(link, memory) at miss rates of .1 and above; below 300
tok/s for OLMoE's shape with everything resident; below 200 tok/s at 60 experts a token in 4 bits;
less than 3 times accelerate's offload or 2 times the reference engine anywhere; more than 5 us a
layer to decide. Each is reported as met or not.

The link is measured first: random experts of the store itself, by kernels and by the copy engine.
Models have the dimensions of OLMoE-1B-7B and Qwen3-30B-A3B and random weights; speed does not see
values. Random weights do not route like a model, so which experts a step picks is drawn: with a
forced miss rate under LRU, the rest uniformly among the residents; the loads counted must equal the
loads drawn. Every engine computes the same table. Prompts are routed by the random routers, nearly
evenly. Half of the experts have slots, unless it says all resident. Compiled decode steps are other
rows and other goals; how long compiling took is in the rows. Not measured: a trained model's
routing, quality, sampling.

Call A (4 minutes) says whether the engine works here and where a step's time goes; call B (7
minutes) measures the rest, and the rivals last. A section that fails, hangs or ruins its process is
reported, and the next one runs in a new process; until then sections share one, because filling
the store takes longer than most of them. FOLDER/A.json or B.json is written after each section.
Call B takes the link's rates from A.json, and judges the goals by both. With --resume the sections
that the file has are kept; --only takes words of their names.

    python benchmarks/gpu/fast_engine.py --call A --out FOLDER [--resume]
    TRITON_INTERPRET=1 python benchmarks/gpu/fast_engine.py --call A --dry-run    # tiny, on the CPU
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import goals
import plan
from supervise import Supervisor

from melinoe.measure import machine, write_json

WORKER = Path(__file__).with_name("worker.py")


@cache
def this_machine() -> dict[str, Any]:
    """Asked once: it runs git."""
    return machine()


def record_of(
    events: Sequence[dict[str, Any]], dry: bool, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Collect what is known so far; *before*, call A's record, is judged with it."""
    rows = [
        {k: v for k, v in event.items() if k != "event"}
        for event in events
        if event["event"] == "row"
    ]
    found = next((row for row in rows if row["section"] == "link"), (before or {}).get("link", {}))
    card = next((row for row in rows if row["section"] == plan.CARD), {})
    return {
        "benchmark": "gpu_fast_engine",
        "title": "The device engine against the roofs and the others",
        "question": __doc__.strip().splitlines()[0],
        "routing": "drawn: miss rate forced under LRU, else uniform; prompts by random routers",
        "dry_run": dry,
        "link": found,
        "result": [row for row in rows if row["section"] not in ("link", "store")],
        "stores": [row for row in rows if row["section"] == "store"],
        "goals": goals.judge([*(before or {}).get("result", []), *rows]),
        "sections": {e["section"]: e["seconds"] for e in events if e["event"] == "end"},
        "not_measured": [
            {"section": e["section"], "reason": e["reason"]}
            for e in events
            if e["event"] == "failed"
        ],
        "machine": this_machine(),
        "gpu": card.get("gpu", (before or {}).get("gpu")),
        "resumed_from": next((e["machine"] for e in events if e["event"] == "earlier"), None),
    }


def events_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of an earlier run's finished sections, from its file."""
    rows = [*record["stores"], *record["result"]]
    if record["link"] and plan.LINK in record["sections"]:
        rows.insert(0, record["link"])
    ended = [
        {"event": "end", "section": name, "seconds": seconds}
        for name, seconds in record["sections"].items()
    ]
    return [*({"event": "row"} | row for row in rows), *ended]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--call", choices=list(plan.MINUTES), required=True)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, help="default: 4 for A, 7 for B")
    parser.add_argument("--only", nargs="*", default=[], help="words of sections' names")
    parser.add_argument("--resume", action="store_true", help="keep what the file has")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * (arguments.minutes or plan.MINUTES[arguments.call])
    folder: Path = arguments.out or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    out, asked = folder / f"{arguments.call}.json", plan.sections(arguments.call, arguments.dry_run)
    before = None
    if arguments.call == "B" and (folder / "A.json").exists():
        before = json.loads((folder / "A.json").read_text(encoding="utf-8"))
    if arguments.call == "B" and not (before or {}).get("link"):
        asked = {plan.LINK: plan.sections("A", arguments.dry_run)[plan.LINK], **asked}
    earlier: list[dict[str, Any]] = []
    if arguments.resume and out.exists():
        record = json.loads(out.read_text(encoding="utf-8"))
        earlier = [{"event": "earlier", "machine": record["machine"]}, *events_of(record)]
    done = {event["section"] for event in earlier if event["event"] == "end"}
    wanted = {
        name: limit
        for name, limit in asked.items()
        if name not in done and (not arguments.only or any(w in name for w in arguments.only))
    }

    def command(left: Sequence[str], lines: Path) -> list[str]:
        found = record_of([*earlier, *supervisor.events], True, before)["link"]
        words = [sys.executable, str(WORKER), "--lines", str(lines), "--folder", str(folder)]
        words += ["--seconds", str(max(end - time.monotonic(), 0))]
        words += ["--link", json.dumps(found)] if found else []
        words += ["--dry-run"] if arguments.dry_run else []
        return [*words, "--sections", *left]

    def changed(events: list[dict[str, Any]]) -> None:
        if events[-1]["event"] != "row":
            write_json(out, record_of([*earlier, *events], arguments.dry_run, before))

    with tempfile.TemporaryDirectory() as lines_folder:
        supervisor = Supervisor(wanted, command, changed, end, Path(lines_folder))
        events = supervisor.run()
    record = record_of([*earlier, *events], arguments.dry_run, before)
    write_json(out, record)
    print(goals.table(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
