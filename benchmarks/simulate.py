"""
How many layer requests does the simulator replay in a second, at OLMoE's shape?

Question: requests a second, counting included, on one core, for a decoded trace of 16 layers with
64 experts and top-8, 16 slots: the compiled rules against driving the runtime's own class; the
same with prompts of 256 tokens; and how long a miss-ratio curve of all 64 sizes takes in one pass
against one replay per size. Also what the compiled code costs once: loading it, and (only on a
machine that never ran it) compiling it.

The answer that would be bad news: below 1,000,000 requests a second for LRU or LFU. A day of one
user's traffic is some 10^8 requests, and a study replays it for dozens of settings.

Floor: numpy summing the trace's ids once, the least that any replay must read.

Times are CPU time of this process, which uses one thread; engines take turns, round by round.

Not measured: making or reading the trace.

    python benchmarks/simulate.py [--rows 20000] [--rounds 7] [--out FILE]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from common import publish

from melinoe.cache.curves import miss_curves
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace

EXPERTS, TOP_K, SLOTS, LAYERS = 64, 8, 16, 16
GOAL = 1_000_000
COMPILED = ("lru", "lfu", "static", "belady")


def skewed(rows: int, prompt: int) -> Trace:
    """Skewed random choices: 20 sequences, each a prompt computed at once and then decoding."""
    rng = np.random.default_rng(0)
    each = rows // 20
    experts = np.concatenate(
        [
            np.argsort(
                -(rng.normal(0, 2.5, (LAYERS, EXPERTS)) + rng.gumbel(size=(each, LAYERS, EXPERTS))),
                axis=-1,
            )[..., :TOP_K]
            for _ in range(20)
        ]
    ).astype(np.int16)
    place = np.tile(np.arange(each), 20)
    forward = np.cumsum((place == 0) | (place >= prompt)) - 1
    return Trace(
        experts,
        forward.astype(np.int32),
        np.repeat(np.arange(20, dtype=np.int32), each),
        (place >= prompt).astype(np.uint8),
        EXPERTS,
    )


def timed(act) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values)),
        "min": round(min(values)),
        "max": round(max(values)),
    }


def rates(trace: Trace, small: Trace, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Requests a second by policy and engine; the slow engine replays the first rows only."""
    found = {name: {"compiled": [], "residency": []} for name in COMPILED}
    for _ in range(rounds):
        for name in COMPILED:
            for engine, subject in (("compiled", trace), ("residency", small)):
                requests = subject.num_forwards * LAYERS
                seconds = timed(lambda n=name, s=subject, e=engine: simulate(s, SLOTS, n, engine=e))
                found[name][engine].append(requests / seconds)
    return {name: {e: spread(values) for e, values in one.items()} for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()

    decoded, with_prompts = skewed(args.rows, 1), skewed(args.rows, min(256, args.rows // 40))
    small = decoded.select([0])
    first_s = timed(lambda: simulate(small, SLOTS, "lru", engine="compiled"))
    floor_s = statistics.median(timed(lambda: int(decoded.experts.sum())) for _ in range(5))
    results = rates(decoded, small, args.rounds)
    prompts = rates(with_prompts, with_prompts.select([0]), max(1, args.rounds // 2))
    one_pass, each = [], []
    for _ in range(max(1, args.rounds // 2)):
        one_pass.append(timed(lambda: miss_curves(decoded, "lru")))
        each.append(timed(lambda: [simulate(decoded, c, "lru") for c in range(1, EXPERTS + 1)]))
    rows = []
    for name in COMPILED:
        rows.append(
            {
                "policy": name,
                "compiled_requests_per_s": results[name]["compiled"],
                "residency_requests_per_s": results[name]["residency"],
                "compiled_with_prompts_requests_per_s": prompts[name]["compiled"],
            }
        )
        print(
            f"{name:7} compiled {results[name]['compiled']['median']:10,} requests/s, residency "
            f"{results[name]['residency']['median']:8,}, compiled with prompts "
            f"{prompts[name]['compiled']['median']:9,}",
            file=sys.stderr,
        )
    slowest = min(results[name]["compiled"]["median"] for name in ("lru", "lfu"))
    record = {
        "benchmark": "simulate",
        "title": "Layer requests replayed in a second on one core, at OLMoE's shape",
        "result": rows,
        "curve_of_all_sizes_s": {
            "one_pass": round(statistics.median(one_pass), 3),
            "one_replay_per_size": round(statistics.median(each), 3),
        },
        "first_call_s": round(first_s, 3),
        "floor_requests_per_s": round(decoded.num_forwards * LAYERS / floor_s),
        "slowest_of_lru_and_lfu": slowest,
        "goal": GOAL,
        "goal_met": slowest >= GOAL,
        "shape": {"experts": EXPERTS, "top_k": TOP_K, "slots": SLOTS, "layers": LAYERS},
        "settings": {"rows": args.rows, "rounds": args.rounds},
    }
    publish(record, args.out)


if __name__ == "__main__":
    main()
