"""
Do another simulator and ours count the same on the same trace?

Question: hits of LRU and Belady under moe-policylang's replay and under `melinoe.cache`, on a trace
of the shipped model's completions, cold before each sequence, for three cache sizes.

The other replay serves a token's experts one after the other, in the order of a partial sort: each
is a hit or not at its own turn, and may be evicted before the token is done. A request here is all
of them together: none is evicted for another. So the same trace is given three ways:

- ``first choice``: of each token only its best expert. Both meanings agree, so must all counts.
- ``one by one``: every choice as a request of its own, in the other's order. LRU must agree. The
  other's Belady looks from the next token on, so that it may evict an expert that the same token
  still needs; it can lose hits to the true bound, and must never beat it.
- ``together``: as a model really asks. What the first two leave out, as a difference.

The answer that would be bad news: a difference in ``first choice``, in LRU's ``one by one``, or a
bound of ours below the other's.

Counts only, so the machine does not matter. moe-policylang is no dependency: install it beside.

    python benchmarks/compare_policylang.py [--prompts 6] [--tokens 48] [--out FILE]
"""

import argparse
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace, TraceBuilder
from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode_prompts, load_examples
from melinoe.engine.load import load
from melinoe.generate import trace_prompts
from melinoe.measure import machine, write_json
from melinoe.shipped import GSM8K_TEST, TINY_OLMOE

SIZES = (0.25, 0.5, 0.75)


def shipped_trace(prompts: int, tokens: int) -> Trace:
    """The shipped model's completions."""
    model, handle = load(TINY_OLMOE, slots=32, store="ram")
    tokenizer = load_tokenizer(TINY_OLMOE, model.config)
    examples = load_examples(str(GSM8K_TEST), limit=prompts)
    encoded = encode_prompts(examples, tokenizer)
    return trace_prompts(model, handle, tokenizer, encoded, tokens)


def softmax_rows(trace: Trace, sequence: int) -> np.ndarray:
    """What the other replay takes: a row of weights, float32 (tokens, layers, experts)."""
    chosen = trace.completion(sequence)
    # A trace lists choices by their weight; what it was does not matter to a replay.
    weights = np.broadcast_to(np.arange(trace.top_k, 0, -1) / 10, chosen.shape)
    full = np.zeros((*chosen.shape[:2], trace.num_experts), np.float32)
    np.put_along_axis(full, chosen.astype(np.int64), weights.astype(np.float32), axis=-1)
    # Equal weights must not let it pick others than the model did.
    assert (
        np.sort(np.argpartition(-full, trace.top_k - 1)[..., : trace.top_k]) == np.sort(chosen)
    ).all()
    return full


def theirs(rows: list[np.ndarray], top_k: int, policy: str, size: float) -> tuple[int, int]:
    from moe_policylang.benchmark.replay import replay_policies
    from moe_policylang.integrations.trace_recorder import TraceEntry, TraceRecording

    layers, experts = rows[0].shape[1:]
    entries = [
        TraceEntry(
            prompt_id=prompt,
            token_idx=token,
            layer_idx=layer,
            selected_experts=[],
            router_scores=[],
            router_softmax=full[token, layer],
        )
        for prompt, full in enumerate(rows)
        for token in range(len(full))
        for layer in range(layers)
    ]
    recording = TraceRecording("shipped", layers, experts, top_k, entries, True)
    (found,) = replay_policies(recording, top_k, [policy], [size])
    return found.hits, found.accesses


def ours(rows: list[np.ndarray], top_k: int, policy: str, size: float, apart: bool) -> int:
    """Hits; *apart*: every choice a request of its own, in the other's order."""
    layers, experts = rows[0].shape[1:]
    builder = TraceBuilder(layers, experts, 1 if apart else top_k)
    for sequence, full in enumerate(rows):
        order = np.stack(
            [[np.argpartition(-row, top_k - 1)[:top_k] for row in token] for token in full]
        )
        for token in order:
            if apart:
                for k in range(top_k):
                    builder.add_forward(token[None, :, k, None], sequence, 1)
            else:
                builder.add_forward(token[None], sequence, 1)
    slots = max(top_k, round(experts * size))
    done = simulate(builder.trace(), slots, policy, reset_between_sequences=True)
    return int(done.counters.hits.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    try:
        other = version("moe-policylang")
    except PackageNotFoundError:
        sys.exit("moe-policylang is not installed; pip install moe-policylang, then run this again")

    trace = shipped_trace(args.prompts, args.tokens)
    rows = [softmax_rows(trace, sequence) for sequence in range(trace.num_sequences)]
    result, agree = [], True
    for way, top_k in (("first choice", 1), ("one by one", trace.top_k), ("together", trace.top_k)):
        for name, policy in (("topk_lru", "lru"), ("belady", "belady")):
            for size in SIZES:
                hits, uses = theirs(rows, top_k, name, size)
                mine = ours(rows, top_k, policy, size, apart=way != "together")
                equal = mine == hits
                must = way == "first choice" or (way == "one by one" and policy == "lru")
                agree &= equal or not must
                if way == "one by one" and policy == "belady":
                    agree &= mine >= hits
                result.append(
                    {
                        "requests": way,
                        "policy": policy,
                        "slots": max(top_k, round(trace.num_experts * size)),
                        "uses": uses,
                        "hits_of_moe_policylang": hits,
                        "hits_of_melinoe": mine,
                        "equal": equal,
                        "must_be_equal": must,
                    }
                )
                print({k: v for k, v in result[-1].items()}, file=sys.stderr)
    record = {
        "benchmark": "compare_policylang",
        "title": "Hits counted by moe-policylang's replay and by melinoe on the same trace",
        "result": result,
        "agree": agree,
        "moe_policylang": other,
        "settings": {"prompts": args.prompts, "tokens": args.tokens},
        "machine": machine(),
    }
    print(json.dumps(record))
    if args.out is not None:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
