"""
Does the time model predict what decoding over the emulated link takes, whatever is done on a miss?

Question: predicted against measured milliseconds per decoded token, for several slots, bandwidths,
policies and ways to handle misses, on the shipped model. The model is told figures of this machine
and engine, measured in the same process on none of the configurations that it predicts: a runtime
with every expert resident goes through the motions of misses, one kind at a time
(`melinoe.engine.rehearsal`). Loads per layer and token come from simulating one trace.

The answer that would be bad news: an error beyond 10 % in any configuration; then time in the
simulator's tables would be no better than a guess.

Floor: what the link alone takes, loads x (latency + bytes / bandwidth).

Motions and configurations run prompt by prompt in turn, each round in another random order, so
that what the machine does meanwhile, and what the one before left in its caches, falls on all
alike. Each decoding step is timed by itself and counts as the median of its repeats, so that a
burst of other work in one run is left out; the last step of a prompt has no end of its own and
counts nowhere.

Not measured: real links, where copies and computing share memory bandwidth; prompts (their time is
predicted from rows by a straight line, which is not what this is about).

    python benchmarks/predicted_time.py [--prompts 4] [--tokens 32] [--repeat 5] [--out FILE]
"""

import argparse
import json
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import numpy as np
import torch

from melinoe.cache.simulator import simulate
from melinoe.cache.timing import predict
from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode_prompts, load_examples
from melinoe.engine.load import load
from melinoe.engine.misses import Misses
from melinoe.engine.rehearsal import LOADS, MOTIONS, Rehearsal, figures_from, over, time_calls
from melinoe.engine.transfer import EmulatedLink
from melinoe.generate import generate, trace_prompts
from melinoe.measure import machine, write_json
from melinoe.shipped import GSM8K_TEST, TINY_OLMOE

EXPERTS = 32
LATENCY_S = 20e-6
# Slots, bytes/s, policy, on a miss. A transfer of the shipped model's expert takes .1 to 2.5 ms.
CASES = [
    (8, 1000e6, "lru", "wait"),
    (8, 300e6, "lru", "wait"),
    (8, 100e6, "lru", "wait"),
    (8, 300e6, "lfu", "wait"),
    (16, 300e6, "lru", "wait"),
    (16, 100e6, "lfu", "wait"),
    (24, 30e6, "lru", "wait"),
    (8, 30e6, "lfu", "wait"),
    (1, 300e6, "lru", "wait"),
    (8, 300e6, "lru", "cpu"),
    (8, 100e6, "lru", "split"),
    (8, 30e6, "lfu", "split"),
    (16, 300e6, "lru", "split"),
]


class Steps:
    """When each forward pass of a model began."""

    def __init__(self, model):
        self.began = []
        model.register_forward_pre_hook(lambda *_: self.began.append(time.perf_counter()))

    @contextmanager
    def of(self, into):
        """Append to *into* the seconds of each decoding step but the last."""
        self.began.clear()
        yield
        into.append(np.diff(self.began)[1:])


def open_case(slots, bandwidth, policy, miss):
    """A runtime; misses are handled by what was measured for it, which the simulator is told."""
    link = EmulatedLink(bandwidth, LATENCY_S)
    return load(TINY_OLMOE, slots=slots, policy=policy, store="ram", link=link, miss=miss)


def serve(cases, prompts, tokenizer, tokens, repeat):
    """Per case: seconds of each step, medians over repeats, and what was loaded and computed."""
    steps = {case: [] for case in cases}
    counts = {case: np.zeros(2) for case in cases}
    order, shuffle = list(cases), Random(0)
    for number, prompt in enumerate(prompts):
        runs = {case: [] for case in cases}
        for turn in range(repeat):
            shuffle.shuffle(order)
            for case in order:
                model, handle, clock, motion = cases[case]
                if handle.slots < EXPERTS:
                    handle.reset_cache()
                with motion(), clock.of(runs[case]):
                    done = generate(model, handle, tokenizer, prompt, tokens)
                if not turn:
                    counted = done.counters
                    counts[case] += counted.loads[1].sum(), counted.on_host[1].sum()
        for case, times in runs.items():
            steps[case].append(np.median(times, axis=0))
        print(f"prompt {number + 1} of {len(prompts)}", file=sys.stderr)
    return {case: np.concatenate(times) for case, times in steps.items()}, counts


def predicted_steps(simulation, figures, work):
    """Predicted seconds of the decoding steps that were measured: all but each prompt's last."""
    timing = predict(simulation, figures, work)
    decoding = simulation.steps.phase == 1
    of_unit = simulation.steps.unit
    last = np.append(of_unit[1:] != of_unit[:-1], True)
    return timing.pass_s[decoding & ~last]


def row_of(case, handle, trace, figures, work, measured, counted):
    slots, bandwidth, policy, miss = case
    rule = handle.misses.rule
    simulation = simulate(trace, slots, policy, load=rule, reset_between_sequences=True, steps=True)
    counters = simulation.counters
    found = counters.loads[1].sum(), counters.on_host[1].sum()
    assert tuple(counted) == found, f"simulated {found}, measured {tuple(counted)}"
    seconds = predicted_steps(simulation, over(figures, handle), work)
    assert len(seconds) == len(measured), "not the same steps"
    tokens = counters.tokens[1]
    predicted_ms, measured_ms = 1e3 * float(seconds.mean()), 1e3 * float(measured.mean())
    floor = 1e3 * found[0] / tokens * (LATENCY_S + work.expert_bytes / bandwidth)
    row = {
        "slots": slots,
        "policy": policy,
        "miss": miss,
        "link_gb_s": bandwidth / 1e9,
        "transfers_per_token": round(found[0] / tokens, 3),
        "computed_there_per_token": round(found[1] / tokens, 3),
        "link_floor_ms": round(floor, 3),
        "predicted_ms": round(predicted_ms, 3),
        "measured_ms": round(measured_ms, 3),
        "error": round(predicted_ms / measured_ms - 1, 4),
    }
    print(
        f"{policy} {slots:2} slots {bandwidth / 1e6:5.0f} MB/s {miss:5}: predicted "
        f"{predicted_ms:7.3f} ms, measured {measured_ms:7.3f} ({row['error']:+.1%})",
        file=sys.stderr,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)

    resident, handle = load(TINY_OLMOE, slots=EXPERTS, store="ram")
    tokenizer = load_tokenizer(TINY_OLMOE, resident.config)
    examples = load_examples(str(GSM8K_TEST), limit=args.prompts)
    prompts = encode_prompts(examples, tokenizer)
    trace = trace_prompts(resident, handle, tokenizer, prompts, args.tokens)
    rehearsal, clock = Rehearsal(handle), Steps(resident)
    cases = {
        motion: (resident, handle, clock, lambda motion=motion: rehearsal.doing(motion))
        for motion in MOTIONS
    }
    for case in CASES:
        model, other = open_case(*case)
        cases[case] = (model, other, Steps(model), nullcontext)
    for model, other, _, motion in cases.values():  # warm-up
        with motion():
            generate(model, other, tokenizer, prompts[0], 4)

    steps, counts = serve(cases, prompts, tokenizer, args.tokens, args.repeat)
    passes = sum(int(one) for one in simulate(trace, EXPERTS).counters.tokens[1:])
    calibration = {motion: float(steps[motion].mean()) for motion in MOTIONS}
    figures = figures_from(calibration, handle, counts[LOADS][0] / passes, time_calls(handle))
    work = open_work(cases)
    figures = replace(figures, host_row_s=0.0)
    rows = [
        row_of(case, cases[case][1], trace, figures, work, steps[case], counts[case])
        for case in CASES
    ]
    worst = max(abs(row["error"]) for row in rows)
    print({k: round(1e3 * v, 3) for k, v in calibration.items()}, file=sys.stderr)
    record = {
        "benchmark": "predicted_time",
        "title": "Predicted and measured time per decoded token over the emulated link",
        "result": rows,
        "worst_error": worst,
        "goal": 0.10,
        "goal_met": worst <= 0.10,
        "calibration": {
            "motions_ms": {str(name): round(1e3 * value, 4) for name, value in calibration.items()},
            "figures": asdict(figures),
            "expert_bytes": work.expert_bytes,
            "latency_us": LATENCY_S * 1e6,
        },
        "settings": {"prompts": args.prompts, "tokens": args.tokens, "repeat": args.repeat},
        "machine": machine(),
    }
    print(json.dumps(record))
    if args.out is not None:
        write_json(args.out, record)


def open_work(cases):
    """Bytes of an expert and of a token, as a runtime that computes misses measured them."""
    misses: Misses = next(
        handle.misses for _, handle, _, _ in cases.values() if handle.misses.work is not None
    )
    return misses.work


if __name__ == "__main__":
    main()
