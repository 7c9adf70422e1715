"""
How long does it take to decide who is resident, at OLMoE's shape?

Question: microseconds of one `Residency.request` for one token of one layer (64 experts, top-8,
16 slots), with all 8 resident and with one missing, for each policy; and what `request_in_parts`
and counting add for a runtime; and layer requests a second when a whole trace is replayed.

The answer that would be bad news: over 10 us for an all-hits request. With 16 layers that is
160 us of every token, a fifth of the 0.77 ms that OLMoE's weights need through an H100's memory,
and the reference engine would be slow for a reason that is ours. For replay: under 100,000
requests a second, which makes a study of policies over a day's trace an overnight job.

Floor: looking 8 ids up in a dictionary, in the same process; pure Python cannot do less.

Times are CPU time of this process, which uses one thread: other jobs on the machine disturb them
less than they would a wall clock.

Not measured: copying experts, and reading ids back from a device.

    python benchmarks/decide.py [--out benchmarks/results/decide.json]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from common import publish

from melinoe.cache.counters import Counters
from melinoe.cache.policy import policy
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace

EXPERTS, TOP_K, SLOTS, LAYERS = 64, 8, 16, 16
POLICIES = ("lru", "lfu", "static", "belady")
WARM_UP, ROUNDS = 200, 2000
# Experts 0 to 6 are in every request with a miss, and each of 16 to 63 misses once.
MISSES = [[*range(TOP_K - 1), expert] for expert in range(SLOTS, EXPERTS)]


def hits() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [sorted(rng.permutation(SLOTS)[:TOP_K].tolist()) for _ in MISSES]


def fresh(name: str, requests: list[list[int]]) -> Residency:
    first = list(range(SLOTS))
    options = {
        "belady": {"future": [first, *requests]},
        "static": {"popularity": range(EXPERTS, 0, -1)},
    }
    residency = Residency(EXPERTS, SLOTS, policy(name, **options.get(name, {})))
    residency.request(first, None, [1 / SLOTS] * SLOTS)
    return residency


def time_us(act, prepare, requests, misses: int) -> dict[str, float]:
    """Median and range of microseconds a request, over rounds of equal work after a warm-up."""
    rounds = []
    for _ in range(WARM_UP + ROUNDS):
        subject = prepare()
        start = time.process_time()
        loads = act(subject, requests)
        rounds.append((time.process_time() - start) / len(requests) * 1e6)
        assert loads is None or loads == misses * len(requests)
    return summary(rounds[WARM_UP:])


def summary(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20)
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "p5": round(cuts[0], 3),
        "p95": round(cuts[-1], 3),
        "max": round(max(values), 3),
    }


def look_up(resident: dict[int, int], requests: list[list[int]]) -> None:
    for experts in requests:
        [expert for expert in experts if expert not in resident]


def decide(residency: Residency, requests: list[list[int]]) -> int:
    request, loads = residency.request, 0
    for experts in requests:
        loads += len(request(experts).loads)
    return loads


def decide_and_count(residency: Residency, requests: list[list[int]]) -> int:
    counters, uses = Counters(LAYERS), [1] * TOP_K
    counters.begin_forward("completion", 1)
    for experts in requests:
        plans = tuple(residency.request_in_parts(experts, uses))
        counters.add_decisions(0, experts, uses, plans)
    return int(counters.loads.sum())


def replay() -> dict[str, dict[str, float]]:
    """
    Layer requests a second over skewed random choices: 8 prompts of 64 tokens, 64 new ones.

    Through the runtime's own class; `benchmarks/simulate.py` times the compiled rules.
    """
    rng = np.random.default_rng(0)
    chosen = []
    for _ in range(8):
        taste = rng.normal(0, 2.5, (LAYERS, EXPERTS))
        noisy = taste + rng.gumbel(size=(128, LAYERS, EXPERTS))
        chosen.append(np.argsort(-noisy, axis=-1)[..., :TOP_K])
    row = np.tile(np.arange(128), 8)
    sequence = np.repeat(np.arange(8), 128)
    trace = Trace(
        np.concatenate(chosen).astype(np.int16),
        (65 * sequence + np.maximum(row - 63, 0)).astype(np.int32),
        sequence.astype(np.int32),
        (row >= 64).astype(np.uint8),
        EXPERTS,
    )
    result = {}
    for name in POLICIES:
        rates = []
        for _ in range(9):
            start = time.process_time()
            counters = simulate(trace, SLOTS, name, engine="residency").counters
            rates.append(float(counters.requests.sum()) / (time.process_time() - start))
        rates = sorted(rates[2:])
        result[name] = {
            "median": round(statistics.median(rates)),
            "min": round(rates[0]),
            "max": round(rates[-1]),
            "hit_rate": round(counters.hit_rate("completion"), 4),
            "loads_per_request": round(float(counters.loads.sum() / counters.requests.sum()), 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    out: Path | None = parser.parse_args().out

    all_hits = hits()
    floor = time_us(look_up, lambda: dict.fromkeys(range(SLOTS), 0), all_hits, 0)
    print(f"floor: 8 look-ups {floor['median']:6.2f} us", file=sys.stderr)
    micros: dict[str, dict[str, dict[str, float]]] = {}
    for name in POLICIES:
        micros[name] = {}
        for case, requests, misses, act in (
            ("all_hits", all_hits, 0, decide),
            ("one_miss", MISSES, 1, decide),
            ("all_hits_counted", all_hits, 0, decide_and_count),
            ("one_miss_counted", MISSES, 1, decide_and_count),
        ):
            figure = time_us(act, lambda n=name, r=requests: fresh(n, r), requests, misses)
            micros[name][case] = figure
            print(
                f"{name:7} {case:17} {figure['median']:6.2f} us  "
                f"({figure['p5']:.2f} to {figure['p95']:.2f} in 90 % of rounds)",
                file=sys.stderr,
            )
    rates = replay()
    for name, rate in rates.items():
        print(f"{name:7} replay {rate['median']:9,.0f} requests/s", file=sys.stderr)

    worst = max(micros[name]["all_hits"]["median"] for name in ("lru", "lfu"))
    record = {
        "benchmark": "decide",
        "title": "Microseconds to decide one request, and replay speed",
        "result": [
            {
                "policy": name,
                "all_hits_us": micros[name]["all_hits"],
                "one_miss_us": micros[name]["one_miss"],
                "all_hits_counted_us": micros[name]["all_hits_counted"],
                "replay_requests_per_s": rates[name],
            }
            for name in micros
        ],
        "shape": {"experts": EXPERTS, "top_k": TOP_K, "slots": SLOTS, "layers": LAYERS},
        "rounds": ROUNDS,
        "requests_per_round": len(MISSES),
        "floor_us": floor,
        "request_us": micros,
        "replay_requests_per_s": rates,
        "worst_all_hits_us": worst,
        "goal_us": 10,
        "goal_met": worst < 10,
    }
    publish(record, out)


if __name__ == "__main__":
    main()
