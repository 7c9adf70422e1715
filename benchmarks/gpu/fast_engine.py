"""
How near is the fast engine to what the link and the memory allow, and how far ahead of the others?

Bad news would be: below 80 % of the roof max(link, memory) at miss rates of .1 and above; below 300
tok/s for OLMoE's shape with everything resident; below 200 tok/s at 60 experts a token in 4 bits;
less than 3 times accelerate's offload or 2 times the reference engine anywhere; more than 5 us a
layer to decide. Each is reported as met or not.

Roofs come first, measured: the link by the copy engine and by kernel reads, device memory. Models
have the dimensions of OLMoE-1B-7B and Qwen3-30B-A3B (as many layers as fit) and random weights;
speed does not see values. Random weights do not route like a model, so which experts a step picks
is drawn: with a forced miss rate under LRU, the rest uniformly among the residents; the loads
counted must equal the loads drawn. Every engine computes the same table. Prompts are routed by the
random routers, nearly evenly. Half of the experts have slots, unless it says all resident.
Compiled decode steps are other rows and other goals; how long compiling took is in the rows.
Not measured: a trained model's routing, quality, sampling.

Sections run in a process of their own, each with a limit of time: one that fails, hangs or ruins
its process is reported, and the next one runs. FILE is written after each. With --resume the
sections that FILE has are kept and only the others run; --only takes words that their names hold.

    python benchmarks/gpu/fast_engine.py --out FILE [--minutes 8] [--qwen-layers N] [--resume]
    TRITON_INTERPRET=1 python benchmarks/gpu/fast_engine.py --dry-run    # tiny, on the CPU
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


def record_of(events: Sequence[dict[str, Any]], dry: bool) -> dict[str, Any]:
    """What is known so far, with the goals judged by it."""
    rows = [
        {k: v for k, v in event.items() if k != "event"}
        for event in events
        if event["event"] == "row"
    ]
    found = next((row for row in rows if row["section"] == "roofs"), {})
    return {
        "benchmark": "gpu_fast_engine",
        "title": "The fast engine against the roofs and the others",
        "question": __doc__.strip().splitlines()[0],
        "routing": "drawn: miss rate forced under LRU, else uniform; prompts by random routers",
        "dry_run": dry,
        "bandwidth_bytes_per_s": found,
        "result": [row for row in rows if row["section"] not in ("roofs", "store")],
        "stores": [row for row in rows if row["section"] == "store"],
        "goals": goals.judge(rows),
        "sections": {e["section"]: e["seconds"] for e in events if e["event"] == "end"},
        "not_measured": [
            {"section": e["section"], "reason": e["reason"]}
            for e in events
            if e["event"] == "failed"
        ],
        "machine": this_machine(),
        "gpu": found.get("gpu"),
        "resumed_from": next((e["machine"] for e in events if e["event"] == "earlier"), None),
    }


def events_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of an earlier run's finished sections, from its file."""
    rows = [*record["stores"], *record["result"]]
    if record["bandwidth_bytes_per_s"]:
        rows.insert(0, record["bandwidth_bytes_per_s"])
    ended = [
        {"event": "end", "section": name, "seconds": seconds}
        for name, seconds in record["sections"].items()
    ]
    return [*({"event": "row"} | row for row in rows), *ended]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--qwen-layers", type=int, help="default: as many as fit")
    parser.add_argument("--only", nargs="*", default=[], help="words of sections' names")
    parser.add_argument("--resume", action="store_true", help="keep what FILE has")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    earlier: list[dict[str, Any]] = []
    if arguments.resume and arguments.out and arguments.out.exists():
        record = json.loads(arguments.out.read_text(encoding="utf-8"))
        earlier = [{"event": "earlier", "machine": record["machine"]}, *events_of(record)]
    done = {event["section"] for event in earlier if event["event"] == "end"}
    wanted = {
        name: limit
        for name, limit in plan.sections(arguments.dry_run).items()
        if name not in done
        and (not arguments.only or name == plan.ROOFS or any(w in name for w in arguments.only))
    }

    def command(left: Sequence[str], lines: Path) -> list[str]:
        found = record_of([*earlier, *supervisor.events], True)["bandwidth_bytes_per_s"]
        words = [sys.executable, str(WORKER), "--lines", str(lines)]
        if arguments.qwen_layers:
            words += ["--qwen-layers", str(arguments.qwen_layers)]
        words += ["--seconds", str(max(end - time.monotonic(), 0))]
        words += ["--roofs", json.dumps(found)] if found else []
        words += ["--dry-run"] if arguments.dry_run else []
        return [*words, "--sections", *left]

    def changed(events: list[dict[str, Any]]) -> None:
        if arguments.out and events[-1]["event"] != "row":
            write_json(arguments.out, record_of([*earlier, *events], arguments.dry_run))

    with tempfile.TemporaryDirectory() as folder:
        supervisor = Supervisor(wanted, command, changed, end, Path(folder))
        events = supervisor.run()
    record = record_of([*earlier, *events], arguments.dry_run)
    if arguments.out:
        write_json(arguments.out, record)
    print(goals.table(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
