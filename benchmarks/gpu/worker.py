"""
One process of the device engine's benchmark: works off sections, and tells the supervisor by lines.

    python benchmarks/gpu/worker.py --sections NAME [NAME ...] --lines FILE [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import plan
import products
import rivals
import sections
import shapes
import smoke

PARTS = {
    "link": sections.measure_link,
    "split": sections.split,
    "profile": sections.profile,
    "half resident": sections.half_resident,
    "products": products.measure,
    "all resident": sections.all_resident,
    "reference engine": sections.reference,
    "transformers, all resident": rivals.resident,
    "accelerate offload": rivals.accelerate_offload,
    "transformers, compiled": rivals.compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--sections", nargs="+", required=True)
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for files beside the results")
    parser.add_argument("--seconds", type=float, default=1e9, help="until no section is begun")
    parser.add_argument("--link", type=json.loads, help="measured before, in JSON")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    kernels: Any = nullcontext()
    if arguments.dry_run:  # the interpreter's time says nothing, and is long
        from kernels_on_the_host import on_the_host

        kernels = on_the_host()
    with kernels, arguments.lines.open("a", encoding="utf-8", buffering=1) as lines:

        def tell(event: str, **more: Any) -> None:
            lines.write(json.dumps({"event": event} | more) + "\n")
            print(json.dumps(more), flush=True)

        bench = sections.Bench(arguments.dry_run, partial(tell, "row"), arguments.folder)
        found: dict[str, Any] = arguments.link or {}
        for name in arguments.sections:
            if time.monotonic() > end:
                tell("failed", section=name, reason="no time left")
                continue
            tell("begin", section=name)
            begin = time.monotonic()
            failure = None
            try:
                run_one(bench, name, found)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:300]
                if not isinstance(error, LookupError):
                    traceback.print_exc()
                    if bench.dry:
                        raise
                failure = reason
            sound = is_sound(bench)
            if failure is None:
                tell("end", section=name, seconds=round(time.monotonic() - begin, 1))
            else:
                tell("failed", section=name, reason=failure)
            if not sound:  # every later call would fail too: let another process go on
                lines.flush()
                os._exit(3)


def run_one(bench: Any, name: str, found: dict[str, Any]) -> None:
    if name == plan.CARD:
        bench.add(section=name, **smoke.card(bench.dry))
    elif name == plan.SMOKE:
        for step in smoke.smoke(bench.device):
            bench.add(section=name, **step)
    elif name == plan.TESTS:
        others = ["-n", "6", "-k", "not failed_capture"]
        bench.add(section=name, **smoke.run_tests(bench.folder, others))
    elif name == plan.FAILED_CAPTURE:  # what it does to its process, no other test is to feel
        bench.add(section=name, **smoke.run_tests(bench.folder, ["-k", "failed_capture"]))
    else:
        model, layers, kind, part = plan.parts_of(name)
        PARTS[part](bench, shapes.shape_of(model, layers, bench.dry), found, kind)


def is_sound(bench: Any) -> bool:
    """Free the memory that the section left, and tell whether this process can go on."""
    try:
        bench.settle()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    main()
