"""
What one checkpoint is worth: perplexity in and out of domain, and the routing of the same texts.

Transfers are those of *reading* held-out text: every model sees the same tokens. A model's own
greedy completions are judged beside it, because that is what is served; but a model that repeats
itself needs few experts for a bad reason. Numbers are kept per example, so that any two runs can
be compared in pairs afterwards.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from melinoe.cache.counters import PHASES
from melinoe.cache.locality import distinct_experts, experts_per_sequence, reuse
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.checkpoint import describe, load_tokenizer
from melinoe.config import experts_in_share
from melinoe.data import Example, encode, load_examples
from melinoe.engine.load import load
from melinoe.evaluate import Perplexity, perplexity
from melinoe.generate import trace_prompts
from melinoe.measure import reading_trace
from melinoe.shipped import HELD_OUT

SHARES = (0.125, 0.25, 0.5)  # of the experts: 4, 8 and 16 of the shipped model's 32
QUARTER = 0.25
POLICIES = ("lru", "lfu", "belady")
PROMPTS, NEW_TOKENS = 24, 64
DOCUMENTS = 8  # of each other corpus
LENGTH = 512
COMPLETION = PHASES.index("completion")


def judge(path: Path, held_out: list[Example], *, written: bool = True) -> dict[str, Any]:
    """
    Measure the checkpoint at *path* with all experts resident; caches are simulated.

    Args:
        path: Checkpoint directory.
        held_out: In-domain examples; the first `PROMPTS` are also generated from, greedily.
        written: Whether they are.
    """
    everything = describe(str(path)).num_experts
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, handle = load(
        str(path), device, slots=everything, dtype=torch.float32, engine="reference"
    )
    tokenizer = load_tokenizer(str(path), model.config)
    ours = encode(held_out, tokenizer, LENGTH)
    others = {
        file.stem: encode(load_examples(file, limit=DOCUMENTS), tokenizer, LENGTH)
        for file in sorted(HELD_OUT.glob("*.jsonl"))
    }
    quality = {"gsm8k": _quality(perplexity(model, ours), True)}
    for name, texts in others.items():
        quality[name] = _quality(perplexity(model, texts), False)
    read = reading_trace(model, handle, ours)
    elsewhere = reading_trace(model, handle, [text for texts in others.values() for text in texts])
    prompts = [example.prompt for example in held_out[:PROMPTS]]
    own = trace_prompts(model, handle, tokenizer, prompts, NEW_TOKENS) if written else None
    handle.detach()
    return {
        "num_experts": read.num_experts,
        "quality": quality,
        **caches(read),
        "experts_per_sequence": np.round(experts_per_sequence(read), 3).tolist(),
        "reuse": np.round(reuse(read), 4).tolist(),
        "distinct_experts": distinct_experts(read).tolist(),
        **({} if own is None else {"written": caches(own, (QUARTER,))}),
        "elsewhere": caches(elsewhere, (QUARTER,)),
    }


def caches(trace: Trace, shares: tuple[float, ...] = SHARES) -> dict[str, Any]:
    """Loads on demand of each sequence's completion, alone and from cold, and its tokens."""
    transfers = {}
    for size in (experts_in_share(share, trace.num_experts) for share in shares):
        for policy in POLICIES:
            done = simulate(trace, size, policy, reset_between_sequences=True)
            transfers[f"{policy}-{size}"] = {
                "transfers_per_token": done.counters.transfers_per_token(),
                "hit_rate": done.counters.hit_rate("completion"),
                "loads": [int(one.loads[COMPLETION].sum()) for one in done.per_sequence],
            }
    tokens = [int(one.tokens[COMPLETION]) for one in done.per_sequence]
    return {"transfers": transfers, "tokens": tokens}


def _quality(found: Perplexity, in_domain: bool) -> dict[str, Any]:
    return {
        "in_domain": in_domain,
        "perplexity": found.estimate.to_dict(),
        "nll": np.round(found.nll, 3).tolist(),
        "tokens": found.tokens.astype(int).tolist(),
    }
