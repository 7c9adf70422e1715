"""
What do the experts of the last server save the first request of the next one?

`melinoe serve --keep-residency FILE` loads the experts that were resident when the last server
stopped. Here a cache is filled by eight texts of one kind, and a request of that kind comes after a
restart: with an empty cache, and with the cache that was kept. Counted are the experts loaded for
the prompt and the first 32 tokens, and beside them what restoring itself loads, which happens
before the first request comes.

Bad news would be that the prompt, which fills the cache itself, leaves nothing to save. Loads are
exact counts and depend on no clock. Not measured: time, and a model larger than the one that ships.

    python benchmarks/warm_start.py [--texts 6] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import publish
from transformers import AutoTokenizer

import melinoe
from melinoe.generate import generate
from melinoe.serve.run import Residency
from melinoe.shipped import HELD_OUT, TINY_OLMOE
from melinoe.stats import bootstrap, paired_ratio

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
    parser.add_argument("--texts", type=int, default=6, help="requests of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = []
    with tempfile.TemporaryDirectory() as directory:
        for slots in (8, 16):
            made = measure(slots, options.texts, Path(directory) / "residency.json")
            loads = {
                start: [
                    one["prompt_loads"] + one["completion_loads"]
                    for one in made
                    if one["start"] == start
                ]
                for start in ("empty", "kept")
            }
            result.append({
                "slots of 32": slots,
                "requests": len(loads["empty"]),
                "loads of a request, empty start": bootstrap(loads["empty"]).to_dict(),
                "with what was kept": bootstrap(loads["kept"]).to_dict(),
                "ratio": paired_ratio(loads["kept"], loads["empty"]).to_dict(),
                "loaded before it came": max(one["restored"] for one in made),
            })  # fmt: skip
    title = "Experts loaded for the first prompt and 32 tokens after a restart"
    publish({"benchmark": "warm_start", "title": title, "result": result}, options.out)


if __name__ == "__main__":
    main()
