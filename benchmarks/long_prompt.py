"""
Does a long prompt evict the experts of the requests that write beside it?

Four requests write 70 tokens each; once 20 of them stand, a prompt of 320 tokens is read beside
them in chunks of 64, and writes one token. Counted are the experts that the four load once the
prompt is read, against the same four without it. Bad news would be many more of them: then a prompt
would need slots of its own. Loads are exact counts; no clock is read. What the four load while the
prompt is read is not counted: those steps load what the prompt needs.

    python benchmarks/long_prompt.py [--trials 6] [--out FILE]
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
from melinoe.serve.batching import Batches, Limits
from melinoe.serve.body import Asked, Sampling
from melinoe.shipped import HELD_OUT, TINY_OLMOE
from melinoe.stats import bootstrap, paired_ratio

LIMITS = Limits(running=6, waiting=8, context=512, max_tokens=100, cache_tokens=4096, chunk=64)
KINDS = ("novels", "code", "speeches", "drama")


def asked(tokens: int, end: int) -> Asked:
    """Ask for so many tokens, likeliest first, and never the end of the text."""
    return Asked(tokens, Sampling(0.0, logit_bias=((end, -100.0),)))


def steps(slots: int, four: list[list[int]], prompt: list[int] | None, end: int) -> list[Any]:
    """Give tokens and loads of each step."""
    model, handle = melinoe.load(TINY_OLMOE, slots=slots)
    seen: list[Any] = []
    batches = Batches(
        model, handle, LIMITS, lambda cost, _, tokens, __: seen.append((tokens, cost.loads))
    )

    async def run() -> None:
        writing = [batches.submit(ids, asked(70, end), "writes") for ids in four]
        while len(writing[0].tokens) < 20:
            await writing[0].pieces.get()
        if prompt is not None:
            batches.submit(prompt, asked(1, end), "reads")
        for one in writing:
            while not (await one.pieces.get()).done:
                pass

    asyncio.run(run())
    batches.stop()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE)
    texts = []
    for row in range(options.trials):
        for kind in KINDS:
            line = (HELD_OUT / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()[row]
            texts.append(tokenizer(json.loads(line)["text"])["input_ids"])
    result = []
    for slots in (8, 16):
        beside_loads, alone_loads = [], []
        for trial in range(options.trials):
            four = [texts[4 * trial + i][:16] for i in range(4)]
            prompt = (texts[(4 * trial + 5) % len(texts)] * 20)[:320]
            alone = steps(slots, four, None, tokenizer.eos_token_id)
            beside = steps(slots, four, prompt, tokenizer.eos_token_id)
            last = max(at for at, (tokens, _) in enumerate(beside) if tokens > 4)
            after = [loads for _, loads in beside[last + 1 :]]
            beside_loads.append(sum(after))
            alone_loads.append(sum(loads for _, loads in alone[-len(after) :]))
        result.append({
            "slots of 32": slots,
            "trials": options.trials,
            "loads of four requests, alone": bootstrap(alone_loads).to_dict(),
            "after a long prompt": bootstrap(beside_loads).to_dict(),
            "ratio": paired_ratio(beside_loads, alone_loads).to_dict(),
        })  # fmt: skip
    title = "Experts loaded by four requests that write, once a long prompt was read beside them"
    publish({"benchmark": "long_prompt", "title": title, "result": result}, options.out)


if __name__ == "__main__":
    main()
