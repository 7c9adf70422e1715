"""
What do the experts of the last server save the first request of the next one?

`melinoe serve --keep-residency FILE` loads the experts that were resident when the last server
stopped. Here a cache is filled by eight texts of one kind, and a request of that kind comes after a
restart: with an empty cache, and with the cache that was kept. Counted are the experts loaded for
the prompt and the first 32 tokens, and beside them what restoring itself loads, which happens
before the first request comes.

Bad news would be that the prompt, which fills the cache itself, leaves nothing to save. Loads are
exact counts and depend on no clock. Not measured: time, and a model larger than the one that ships.

    python benchmarks/warm_start.py [--texts 12] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

import melinoe
from melinoe.generate import generate
from melinoe.measure import machine, write_json
from melinoe.serve.run import Residency
from melinoe.shipped import HELD_OUT, TINY_OLMOE

WARM, PROMPT, TOKENS = 8, 24, 32


def prompts(kind: str, tokenizer: Any, texts: int) -> list[list[int]]:
    """Give the first tokens of each text of a kind."""
    lines = (HELD_OUT / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(json.loads(line)["text"])["input_ids"][:PROMPT] for line in lines]
    return [one for one in ids if len(one) == PROMPT][: WARM + texts]


def measure(slots: int, texts: int, kept: Path) -> list[dict[str, Any]]:
    """Give one row for each request and start."""
    model, handle = melinoe.load(TINY_OLMOE, slots=slots)
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE)
    residency = Residency(kept, handle, "benchmark")
    rows = []
    for path in sorted(HELD_OUT.glob("*.jsonl")):
        given = prompts(path.stem, tokenizer, texts)
        handle.reset_cache()
        for one in given[:WARM]:
            generate(model, handle, tokenizer, one, max_new_tokens=TOKENS)
        residency.write()
        for request in given[WARM:]:
            for start in ("empty", "kept"):
                handle.reset_cache()
                if start == "kept":
                    residency.restore()
                restored = sum(map(len, handle.resident()))
                made = generate(model, handle, tokenizer, request, max_new_tokens=TOKENS)
                prompt, completion = made.counters.loads.sum(axis=1).tolist()
                rows.append({
                    "kind": path.stem, "start": start, "slots": slots, "restored": restored,
                    "prompt_loads": prompt, "completion_loads": completion,
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=12, help="requests of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for slots in (8, 16):
        made = measure(slots, options.texts, Path("residency.json"))
        Path("residency.json").unlink()
        empty = np.array([r["prompt_loads"] + r["completion_loads"] for r in made
                          if r["start"] == "empty"])  # fmt: skip
        for start in ("empty", "kept"):
            own = [r for r in made if r["start"] == start]
            loads = np.array([r["prompt_loads"] + r["completion_loads"] for r in own])
            saved = 1 - loads.sum() / empty.sum()
            rng = np.random.default_rng(0)
            picks = rng.integers(0, len(loads), (2000, len(loads)))
            range_ = np.quantile(1 - loads[picks].sum(1) / empty[picks].sum(1), [0.025, 0.975])
            rows.append({
                "slots": slots, "start": start, "requests": len(own),
                "prompt_loads": float(np.mean([r["prompt_loads"] for r in own])),
                "completion_loads": float(np.mean([r["completion_loads"] for r in own])),
                "restored": float(np.mean([r["restored"] for r in own])),
                "saved": float(saved), "saved_interval": range_.tolist(),
            })  # fmt: skip
            print(rows[-1])
    result = {"benchmark": "warm_start", "rows": rows, **machine()}
    if options.out:
        write_json(options.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
