"""
Does loading what the predictor names when a request begins spare its first tokens their misses?

`melinoe serve --predictor DIR` loads ahead, before a request's first step, the experts that the
predictor names for its prompt, into the request's share of the slots. Held-out texts of six kinds
are asked for, one after another and four at a time: a prompt of 24 tokens and eight tokens after
it, with the predictor and without, each time on a cache that other requests have left. The
predictor is fitted to a trace of other texts of the same kinds, which is the best case for it.

Bad news would be that the prompt's own pass, which asks for most experts of a layer, evicts again
what was loaded, so that loads on demand fall by less than was loaded ahead. Loads are exact counts
and depend on no clock. Not measured: time, and a model larger than the one that ships.

    python benchmarks/admission.py [--texts 6] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from common import publish
from transformers import AutoTokenizer

import melinoe
from melinoe.generate import trace_prompts
from melinoe.predictor import Predictor
from melinoe.predictor.fit import fit
from melinoe.predictor.model import token_embeddings
from melinoe.serve.batching import Batches, Limits
from melinoe.serve.body import Asked, Sampling
from melinoe.shipped import HELD_OUT, TINY_OLMOE
from melinoe.stats import bootstrap, paired_ratio

PROMPT, TOKENS, LEARNT = 24, 8, 24


def texts(tokenizer: Any) -> list[list[list[int]]]:
    """Give the prompts of each kind."""
    kinds = []
    for path in sorted(HELD_OUT.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        ids = [tokenizer(json.loads(line)["text"])["input_ids"][:PROMPT] for line in lines]
        kinds.append([one for one in ids if len(one) == PROMPT])
    return kinds


def serve(
    slots: int, at_once: int, predictor: Predictor | None, prompts: list[list[int]]
) -> list[Any]:
    """Give what each request cost; the requests before the first of them fill the cache."""
    model, handle = melinoe.load(TINY_OLMOE, slots=slots)
    if predictor is not None:
        predictor.bind(model)
    batches = Batches(model, handle, Limits(running=at_once), predictor=predictor)

    async def run() -> list[Any]:
        done = []
        for first in range(0, len(prompts), at_once):
            ones = [
                batches.submit(ids, Asked(TOKENS, Sampling(temperature=0)), "r")
                for ids in prompts[first : first + at_once]
            ]
            for one in ones:
                while not (await one.pieces.get()).done:
                    pass
            done += [one.cost for one in ones]
        return done

    costs = asyncio.run(run())
    batches.stop()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=6, help="requests of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE)
    kinds = texts(tokenizer)
    learnt = [ids for kind in kinds for ids in kind[options.texts :][:LEARNT]]
    # A kind after another, so that each request finds the experts of another kind.
    asked = [kind[at] for at in range(options.texts) for kind in kinds]
    model, handle = melinoe.load(TINY_OLMOE, slots=32)
    trace = trace_prompts(model, handle, tokenizer, learnt, TOKENS)
    result = []
    for slots in (8, 16):
        predictor = fit(trace, learnt, token_embeddings(model), slots)
        for at_once in (1, 4):
            plain = serve(slots, at_once, None, asked)[len(kinds) :]
            ahead = serve(slots, at_once, predictor, asked)[len(kinds) :]
            loads = [one.loads for one in plain], [one.loads for one in ahead]
            total = [one.loads + one.prefetched for one in ahead]
            result.append({
                "slots of 32": slots,
                "requests at once": at_once,
                "requests": len(plain),
                "loads of a request": bootstrap(loads[0]).to_dict(),
                "on demand, with the predictor": bootstrap(loads[1]).to_dict(),
                "ratio": paired_ratio(loads[1], loads[0]).to_dict(),
                "with those ahead": paired_ratio(total, loads[0]).to_dict(),
            })  # fmt: skip
    title = "Experts loaded for a prompt and eight tokens, when the predictor is asked first"
    publish({"benchmark": "admission", "title": title, "result": result}, options.out)


if __name__ == "__main__":
    main()
