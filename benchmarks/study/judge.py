"""
What one checkpoint is worth: perplexity in and out of domain, routing of its own completions.

Numbers are kept per example, so that any two runs can be compared in pairs afterwards.
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
from melinoe.data import Example, encode, load_examples
from melinoe.evaluate import Perplexity, perplexity
from melinoe.generate import trace_prompts
from melinoe.runtime.load import load
from melinoe.shipped import HELD_OUT

SLOTS = (4, 8, 16)  # 12.5, 25 and 50 % of 32 experts
POLICIES = ("lru", "lfu", "belady")
PROMPTS, NEW_TOKENS = 24, 64
DOCUMENTS = 8  # of each other corpus
LENGTH = 512
COMPLETION = PHASES.index("completion")


def judge(path: Path, held_out: list[Example]) -> dict[str, Any]:
    """
    Measure the checkpoint at *path* with all experts resident; caches are simulated.

    Args:
        path: Checkpoint directory.
        held_out: In-domain examples; the first `PROMPTS` are also generated from, greedily.
    """
    model, handle, tokenizer = load_all(path)
    texts = {
        file.stem: load_examples(file, limit=DOCUMENTS) for file in sorted(HELD_OUT.glob("*.jsonl"))
    }
    quality = {"gsm8k": _quality(perplexity(model, encode(held_out, tokenizer, LENGTH)), True)}
    for name, examples in texts.items():
        quality[name] = _quality(perplexity(model, encode(examples, tokenizer, LENGTH)), False)
    prompts = [example.prompt for example in held_out[:PROMPTS]]
    trace = trace_prompts(model, handle, tokenizer, prompts, NEW_TOKENS)
    handle.detach()
    return {"quality": quality, **locality(trace)}


def load_all(path: Path) -> tuple[Any, Any, Any]:
    """Model, handle and tokenizer with every expert resident."""
    everything = describe(str(path)).num_experts
    model, handle = load(str(path), slots=everything, dtype=torch.float32)
    return model, handle, load_tokenizer(str(path), model.config)


def locality(trace: Trace) -> dict[str, Any]:
    """Experts used and transfers per generated token, of each sequence alone and from cold."""
    transfers = {}
    for slots in SLOTS:
        for policy in POLICIES:
            done = simulate(trace, slots, policy, reset_between_sequences=True)
            transfers[f"{policy}-{slots}"] = {
                "transfers_per_token": done.counters.transfers_per_token(),
                "hit_rate": done.counters.hit_rate("completion"),
                "loads": [int(one.loads[COMPLETION].sum()) for one in done.per_sequence],
            }
    tokens = [int(one.tokens[COMPLETION]) for one in done.per_sequence]
    return {
        "num_experts": trace.num_experts,
        "transfers": transfers,
        "tokens": tokens,
        "experts_per_sequence": np.round(experts_per_sequence(trace), 3).tolist(),
        "reuse": np.round(reuse(trace), 4).tolist(),
        "distinct_experts": distinct_experts(trace).tolist(),
    }


def _quality(found: Perplexity, in_domain: bool) -> dict[str, Any]:
    return {
        "in_domain": in_domain,
        "perplexity": found.estimate.to_dict(),
        "nll": np.round(found.nll, 3).tolist(),
        "tokens": found.tokens.astype(int).tolist(),
    }
