"""
What does each prefetch bring, and what does it waste?

Question: for every named prefetch, precision, recall, waste, transfers a token and adjusted hit
rate, at several slots and policies, on prompts that none of them was made from, each from an empty
cache. What a strategy is made of (popularity, the predictor, stored prompts) comes from the first
part of the prompts, and everything is judged on the rest. Differences to no prefetch are paired by
prompt, with 95 % intervals.

The answer that would be bad news: no strategy with a lower sum of copies than no prefetch, so that
prefetching only moves transfers ahead; and of the learned ones none above popularity.

Floor: no prefetch. A prefetch never lowers bytes by itself: what it copies ahead and is used would
have been copied on demand, so the adjusted hit rate is at most the one without, but for what it
keeps from being evicted.

Everything is simulated from what the model really chose; that these counts are the runtime's is a
test (tests/prefetch/). Not measured: time; see `melinoe bench --prefetch ... --link ...`.

    python benchmarks/prefetch.py [--model tiny] [--data FILE] [--prompts 96] [--tokens 64]
        [--slots 8 16] [--policy lru lfu] [--trace FILE] [--out FILE]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from melinoe.cache.counters import COMPLETION
from melinoe.cache.locality import popularity
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode_prompt, load_examples
from melinoe.engine import load
from melinoe.generate import trace_prompts
from melinoe.measure import machine, write_json
from melinoe.predictor import fit
from melinoe.prefetch import Given, prefetcher, prefetcher_names
from melinoe.prefetch.store import PromptStore
from melinoe.shipped import GSM8K_TEST, TINY_OLMOE
from melinoe.stats import bootstrap, paired_difference


def columns(done) -> dict[str, np.ndarray]:
    """By prompt: what the ratios are made of."""
    rows = [
        (
            one.tokens[COMPLETION],
            one.uses[COMPLETION].sum(),
            one.loads[COMPLETION].sum(),
            one.prefetch_loads.sum(),
            one.prefetch_used.sum(),
            one.prefetch_used[COMPLETION].sum(),
        )
        for one in done.per_sequence
    ]
    names = ("tokens", "uses", "loads", "ahead", "used", "used_decoding")
    return dict(zip(names, np.array(rows, float).T, strict=True))


def row(policy: str, slots: int, name: str, found: dict, base: dict) -> dict:
    """One line of the table; ratios of sums over prompts."""
    copies, before = found["loads"] + found["ahead"], base["loads"] + base["ahead"]
    missed = found["used_decoding"] + found["loads"]
    out = {
        "policy": policy,
        "slots": slots,
        "prefetch": name,
        "demanded_per_token": bootstrap(found["loads"], found["tokens"]).to_dict(),
        "prefetched_per_token": bootstrap(found["ahead"], found["tokens"]).to_dict(),
        "precision": None,
        "recall": bootstrap(found["used_decoding"], missed).to_dict(),
        "wasted_per_token": bootstrap(found["ahead"] - found["used"], found["tokens"]).to_dict(),
        "adjusted_hit_rate": bootstrap(found["uses"] - copies, found["uses"]).to_dict(),
        "demanded_minus_none": paired_difference(
            found["loads"] / found["tokens"], base["loads"] / base["tokens"]
        ).to_dict(),
        "copies_minus_none": paired_difference(
            copies / found["tokens"], before / base["tokens"]
        ).to_dict(),
    }
    if found["ahead"].any():
        out["precision"] = bootstrap(found["used"], found["ahead"]).to_dict()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", default=str(GSM8K_TEST))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--policy", nargs="+", default=["lru", "lfu"])
    parser.add_argument("--share", type=float, default=2 / 3, help="of the prompts, to learn from")
    parser.add_argument("--trace", type=Path, help="keep the trace here, and use it if it is there")
    parser.add_argument("--out", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()

    path = str(TINY_OLMOE) if args.model == "tiny" else args.model
    examples = load_examples(args.data, limit=args.prompts)
    model, handle = load(path, "cpu", expert_memory="64GiB")
    tokenizer = load_tokenizer(path, model.config)
    ids = [encode_prompt(example, tokenizer) for example in examples]
    if args.trace is not None and args.trace.exists():
        trace = Trace.load(args.trace)
    else:
        trace = trace_prompts(
            model, handle, tokenizer, ids, args.tokens, guesses=True,
            progress=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
        if args.trace is not None:
            trace.save(args.trace)
    ends = np.bincount(trace.sequence[trace.kind == 1], minlength=len(ids))
    usable = np.flatnonzero(ends)
    cut = round(args.share * len(usable))
    learn, judge = usable[:cut].tolist(), usable[cut:].tolist()
    past, rest = trace.select(learn), trace.select(judge)
    past_ids, rest_ids = [ids[n] for n in learn], [ids[n] for n in judge]
    weight = model.get_input_embeddings().weight
    rows = []
    for slots in args.slots:
        given = Given(
            popularity(past),
            fit(past, past_ids, weight, slots),
            PromptStore.build(past, past_ids, weight),
        )
        for policy in args.policy:
            base: dict = {}
            for name in prefetcher_names():
                chosen = prefetcher(name, given)
                if chosen is not None:
                    chosen.bind(model, tokenizer)
                done = simulate(
                    rest, slots, policy, prefetch=chosen, prompts=rest_ids,
                    reset_between_sequences=True,
                )  # fmt: skip
                found = columns(done)
                base = base or found
                rows.append(row(policy, slots, name, found, base))
                print(policy, slots, name, file=sys.stderr)
    record = {
        "benchmark": "prefetch",
        "title": "What each prefetch brings, and what it wastes",
        "result": rows,
        "settings": {
            "model": args.model,
            "data": Path(args.data).name,
            "prompts_to_learn_from": len(learn),
            "prompts_judged": len(judge),
            "tokens": args.tokens,
        },
        "machine": machine(),
    }
    print(json.dumps(record))
    if args.out is not None:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
