"""
Set the routing of a checkpoint beside that of real models, in five figures.

Question answered: is a small model a fair ground for the study of caches? It is if its figures are
near those of gpt-oss-20b and OLMoE-1B-7B: how evenly experts are used, how many a short text uses,
and what caches of them miss. A text is 63 tokens, as in public traces of OLMoE, from an empty
cache; of a checkpoint, those after the first 64 of a held-out text, read or (--write) written
greedily. Each corpus counts alike.

    python recipes/routing.py MODEL --text src/melinoe/shipped/held_out
    python recipes/routing.py TRACE.parquet --num-experts 32 --name NAME --real

With --out a row is added to a result file, of which `model_card.py` shows the real models.

    entropy         of the experts' shares of a layer's uses, over its maximum; mean of the layers
    used            share of a layer's experts that one text uses
    lfu, static     misses in 100 uses, a quarter of the experts; static keeps the most used of all
                    texts, known from these very texts
    lfu at half     misses in 100 uses, half of the experts
    lfu / belady    loads, a quarter of the experts, over the fewest possible
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import melinoe
from melinoe.cache.counters import COMPLETION
from melinoe.cache.locality import experts_per_sequence, popularity
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import COMPLETION_ROW, Trace
from melinoe.data import Encoded, load_examples
from melinoe.foreign import read_foreign
from melinoe.generate import trace_prompts
from melinoe.measure import machine, reading_trace, write_json

BEFORE, TOKENS, TEXTS = 64, 63, 16


def passages(tokenizer: Any, corpora: list[Path], texts: int) -> list[list[int]]:
    """Take the first tokens of *texts* long enough texts of each JSONL file."""
    length, found = BEFORE + TOKENS, []
    for path in corpora:
        rows = (
            tokenizer(one.prompt + one.completion, verbose=False)["input_ids"]
            for one in load_examples(path)
        )
        found += [ids[:length] for ids in rows if len(ids) >= length][:texts]
    return found


def trace_of(
    model: Any, tokenizer: Any, corpora: list[Path], texts: int = TEXTS, write: bool = False
) -> Trace:
    """Trace a model while it reads texts, or writes on from their beginnings."""
    found = passages(tokenizer, corpora, texts)
    handle = melinoe.attach(model, slots=model.config.num_experts)
    try:
        if write:
            prompts = [tokenizer.decode(ids[:BEFORE]) for ids in found]
            # The last token that is written is not computed.
            return trace_prompts(model, handle, tokenizer, prompts, TOKENS + 1)
        mask = [False] * BEFORE + [True] * TOKENS
        return reading_trace(model, handle, [Encoded(ids, mask) for ids in found])
    finally:
        handle.detach()


def first_tokens(trace: Trace) -> Trace:
    """Keep the first `TOKENS` completion tokens of each sequence that has as many."""
    rows = np.flatnonzero(trace.kind == COMPLETION_ROW)
    _, starts, counts = np.unique(trace.sequence[rows], return_index=True, return_counts=True)
    kept = np.concatenate(
        [rows[at : at + TOKENS] for at, n in zip(starts, counts, strict=True) if n >= TOKENS]
    )
    return replace(
        trace,
        experts=trace.experts[kept],
        forward=np.arange(len(kept), dtype=np.int32),
        sequence=np.repeat(np.arange(len(kept) // TOKENS), TOKENS).astype(np.int32),
        kind=trace.kind[kept],
    )


def figures(trace: Trace) -> dict[str, float]:
    """Return the five figures, and static's beside LFU's, of texts of equal length."""
    trace = first_tokens(trace)
    counts = popularity(trace)
    share = counts / counts.sum(1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1) / np.log(trace.num_experts)

    def cache(slots: int, policy: str) -> tuple[float, int]:
        done = simulate(trace, slots, policy, reset_between_sequences=True).counters
        hits, loads, uses = (x[COMPLETION].sum() for x in (done.hits, done.loads, done.uses))
        return 100 * float(1 - hits / uses), int(loads)

    quarter, half = trace.num_experts // 4, trace.num_experts // 2
    lfu, lfu_loads = cache(quarter, "lfu")
    return {
        "texts": trace.num_sequences,
        "entropy": float(entropy.mean()),
        "used": float(experts_per_sequence(trace).mean() / trace.num_experts),
        "lfu": lfu,
        "static": cache(quarter, "static")[0],
        "lfu at half": cache(half, "lfu")[0],
        "lfu / belady": lfu_loads / cache(quarter, "belady")[1],
    }


def add_row(row: dict[str, Any], out: Path) -> None:
    """Add a row to a result file, or replace that of its name."""
    rows = json.loads(out.read_text())["result"] if out.exists() else []
    kept = [one for one in rows if one["model"] != row["model"]]
    record = {
        "benchmark": "routing",
        "title": "Routing beside that of real models",
        "result": [*kept, row],
        "notes": [" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[1:2]],
        "machine": machine(),
    }
    write_json(out, record)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", type=Path, help="a checkpoint, or a trace that melinoe can import")
    add(
        "--text", type=Path, nargs="+", help="JSONL files, or directories of them; for a checkpoint"
    )
    add("--texts", type=int, default=TEXTS, help="per JSONL file")
    add("--write", action="store_true", help="let the checkpoint write")
    add("--num-experts", type=int, help="of a trace")
    add("--name", help="of the row; default: the file's")
    add("--real", action="store_true", help="the row is of a model in real use")
    add("--out", type=Path, help="result file to add the row to")
    args = parser.parse_args()
    if args.what.is_dir():
        corpora = [p for one in args.text for p in (sorted(one.glob("*.jsonl")) or [one])]
        model = AutoModelForCausalLM.from_pretrained(args.what, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(args.what)
        trace = trace_of(model, tokenizer, corpora, args.texts, args.write)
    else:
        trace = read_foreign(args.what, num_experts=args.num_experts).trace
    row: dict[str, Any] = {"model": args.name or args.what.name, "real": args.real}
    row |= {name: round(value, 3) for name, value in figures(trace).items()}
    print(json.dumps(row))
    if args.out is not None:
        add_row(row, args.out)


if __name__ == "__main__":
    main()
