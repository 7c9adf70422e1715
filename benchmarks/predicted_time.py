"""
Does the time model predict what decoding over the emulated link takes?

Question: predicted against measured milliseconds per decoded token, for several slots, link
bandwidths and policies, on the shipped model. The model is told four figures of this machine and
engine, measured in the same process on other configurations than those it predicts: the time per
token with all experts resident, the host time of one copy, what else a load costs the host (both
from a run without a link), and the bytes of an expert. Loads per layer and token come from
simulating one trace.

The answer that would be bad news: an error beyond 10 % in any configuration; then time in the
simulator's tables would be no better than a guess.

Floor: what the link alone takes, loads x (latency + bytes / bandwidth).

Configurations run prompt by prompt in turn, each round beginning with another one, so that what the
machine does meanwhile falls on all alike; a prompt's time is the median of its repeats.

Not measured: real links, where copies and computing share memory bandwidth; prompts (their time is
predicted from rows by a straight line, which is not what this is about).

    python benchmarks/predicted_time.py [--prompts 8] [--tokens 48] [--repeat 3] [--out FILE]
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from melinoe.cache.machine import Machine, Work
from melinoe.cache.simulator import simulate
from melinoe.cache.timing import predict
from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode_prompt, load_examples
from melinoe.generate import generate
from melinoe.measure import machine, write_json
from melinoe.runtime.load import load
from melinoe.runtime.transfer import EmulatedLink
from melinoe.shipped import GSM8K_TEST, TINY_OLMOE

EXPERTS = 32
LATENCY_S = 20e-6
CALIBRATION = (EXPERTS, None, "lru"), (8, None, "lru")
# Slots, bytes/s, policy. A transfer of the shipped model's expert takes .2 to 2 ms on these links.
CASES = [
    (8, 1000e6, "lru"),
    (8, 300e6, "lru"),
    (8, 100e6, "lru"),
    (8, 300e6, "lfu"),
    (16, 300e6, "lru"),
    (16, 100e6, "lfu"),
    (24, 30e6, "lru"),
    (8, 30e6, "lfu"),
]


def open_case(slots, bandwidth, policy):
    link = None if bandwidth is None else EmulatedLink(bandwidth, LATENCY_S)
    return load(TINY_OLMOE, slots=slots, policy=policy, store="ram", link=link)


def serve(cases, prompts, tokenizer, tokens, repeat):
    """Per case: decode seconds and tokens, stall and loads, medians over repeats, all prompts."""
    rows = {case: {"seconds": 0.0, "tokens": 0, "stall": 0.0, "loads": 0} for case in cases}
    order = list(cases)
    for number, prompt in enumerate(prompts):
        runs = {case: [] for case in cases}
        for _ in range(repeat):
            order = order[1:] + order[:1]
            for case in order:
                model, handle = cases[case]
                handle.reset_cache()
                runs[case].append(generate(model, handle, tokenizer, prompt, tokens))
        for case, done in runs.items():
            row = rows[case]
            row["seconds"] += statistics.median(one.seconds - one.ttft_s for one in done)
            row["stall"] += statistics.median(one.stall_s for one in done)
            row["tokens"] += done[0].decode_tokens
            row["loads"] += int(done[0].counters.loads[1].sum())
        print(f"prompt {number + 1} of {len(prompts)}", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)

    cases = {case: open_case(*case) for case in (*CALIBRATION, *CASES)}
    resident, handle = cases[CALIBRATION[0]]
    tokenizer = load_tokenizer(TINY_OLMOE, resident.config)
    examples = load_examples(str(GSM8K_TEST), limit=args.prompts)
    prompts = [encode_prompt(example, tokenizer) for example in examples]
    with handle.record() as recorder:
        for prompt in prompts:
            generate(resident, handle, tokenizer, prompt, args.tokens)
    trace = recorder.trace()
    for model, other in cases.values():  # warm-up
        generate(model, other, tokenizer, prompts[0], 4)

    measured = serve(cases, prompts, tokenizer, args.tokens, args.repeat)
    base, bare = (measured[case] for case in CALIBRATION)
    pass_s = base["seconds"] / base["tokens"]
    copy_s = bare["stall"] / bare["loads"]
    # Deciding, renumbering and slicing: what a load costs beside its copy.
    extra_s = (bare["seconds"] - bare["stall"] - pass_s * bare["tokens"]) / bare["loads"]
    work = Work(expert_bytes=handle.expert_memory_bytes / (EXPERTS * len(handle.layers)))
    rows = []
    for slots, bandwidth, policy in CASES:
        case = measured[slots, bandwidth, policy]
        simulation = simulate(trace, slots, policy, reset_between_sequences=True, steps=True)
        assert int(simulation.counters.loads[1].sum()) == case["loads"], "simulated != measured"
        host = Machine(link_bytes_per_s=bandwidth, link_latency_s=LATENCY_S, copy_s=copy_s)
        loads_per_token = case["loads"] / case["tokens"]
        host = replace(host, pass_s=pass_s + max(0.0, extra_s) * loads_per_token)
        metrics = predict(simulation, host, work).metrics()
        seen = 1e3 * case["seconds"] / case["tokens"]
        floor = 1e3 * loads_per_token * (LATENCY_S + work.expert_bytes / bandwidth)
        rows.append(
            {
                "slots": slots,
                "policy": policy,
                "link_gb_s": bandwidth / 1e9,
                "transfers_per_token": round(loads_per_token, 3),
                "link_floor_ms": round(floor, 3),
                "predicted_ms": round(metrics["ms_per_token"], 3),
                "measured_ms": round(seen, 3),
                "error": round(metrics["ms_per_token"] / seen - 1, 4),
                "predicted_stall_ms": round(metrics["stall_ms_per_token"], 3),
                "measured_stall_ms": round(1e3 * case["stall"] / case["tokens"], 3),
            }
        )
        print(
            f"{policy} {slots:2} slots {bandwidth / 1e6:5.0f} MB/s: predicted "
            f"{rows[-1]['predicted_ms']:7.3f} ms, measured {seen:7.3f} ({rows[-1]['error']:+.1%})",
            file=sys.stderr,
        )
    worst = max(abs(row["error"]) for row in rows)
    record = {
        "benchmark": "predicted_time",
        "title": "Predicted and measured time per decoded token over the emulated link",
        "result": rows,
        "worst_error": worst,
        "goal": 0.10,
        "goal_met": worst <= 0.10,
        "calibration": {
            "resident_ms": round(1e3 * pass_s, 3),
            "copy_us": round(1e6 * copy_s, 1),
            "other_us_per_load": round(1e6 * extra_s, 1),
            "expert_bytes": work.expert_bytes,
            "latency_us": LATENCY_S * 1e6,
        },
        "settings": {"prompts": args.prompts, "tokens": args.tokens, "repeat": args.repeat},
        "machine": machine(),
    }
    print(json.dumps(record))
    if args.out is not None:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
