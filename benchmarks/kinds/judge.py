"""
Judge a checkpoint on texts of many kinds: perplexity, loads, and what pinned sets of experts miss.

All models read the same tokens. Numbers stand by text, so that two results can be paired. A text
starts from an empty cache; what its prompt loads is not counted. A pinned set holds a quarter of
each layer's experts for a whole text, and what it lacks goes through a staging place:

    global          the experts used most by all texts of the kinds trained on, but this one
    kind            by the other texts of its kind
    other kind      by another kind trained on; mean over those
    other sequence  by one other text of its kind
    own             by the text itself, known beforehand: a bound
    first half      by the first half of its completion; counted in the second half alone, where
                    `kind, second half` is its rival
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from melinoe.cache.counters import COMPLETION
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import COMPLETION_ROW, Trace
from melinoe.checkpoint import describe
from melinoe.config import experts_in_share
from melinoe.data import Encoded
from melinoe.engine.load import load
from melinoe.evaluate import perplexity
from melinoe.measure import reading_trace

SHARES = (0.125, 0.25, 0.5)
POLICIES = ("lfu", "lru", "belady")


def judge(
    path: Path, texts: dict[str, list[Encoded]], kinds: list[str], num_experts: int
) -> dict[str, Any]:
    """
    Measure the checkpoint at *path*.

    Args:
        texts: Kind to texts, as `texts.held_out` gives them; *kinds* are those trained on.
        num_experts: Of a layer of the base: sizes of caches are shares of it, also where the
            checkpoint has fewer.
    """
    own = describe(str(path)).num_experts
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, handle = load(str(path), device, slots=own, dtype=torch.float32, engine="reference")
    found, uses = {}, {}
    for kind, encoded in texts.items():
        quality = perplexity(model, encoded)
        trace = reading_trace(model, handle, encoded)
        uses[kind] = _uses(trace)
        found[kind] = {
            "nll": np.round(quality.nll, 4).tolist(),
            "tokens": quality.tokens.astype(int).tolist(),
            "uses": uses[kind].sum((1, 2, 3)).astype(int).tolist(),
            "loads": _loads(trace, num_experts),
        }
    handle.detach()
    slots = min(own, experts_in_share(0.25, num_experts))
    for kind, counts in uses.items():
        found[kind]["pinned"] = _pinned(kind, uses, kinds, slots)
        used = counts.sum(1) > 0  # (texts, layers, experts)
        found[kind]["experts"] = {
            "sequence": float(used.sum(-1).mean()),
            "kind": float(used.any(0).sum(-1).mean()),
        }
    every = np.concatenate([uses[kind] for kind in kinds]).sum((0, 1)) > 0
    return {"texts": found, "experts_of_all": float(every.sum(-1).mean())}


def _uses(trace: Trace) -> np.ndarray:
    """Choices in each half of each completion: (texts, 2, layers, experts)."""
    counts = np.zeros((trace.num_sequences, 2, trace.num_layers, trace.num_experts))
    for text in range(trace.num_sequences):
        chosen = trace.experts[(trace.sequence == text) & (trace.kind == COMPLETION_ROW)]
        for half, part in enumerate(np.array_split(chosen, 2)):
            for layer in range(trace.num_layers):
                counts[text, half, layer] = np.bincount(
                    part[:, layer].ravel(), minlength=trace.num_experts
                )
    return counts


def _loads(trace: Trace, num_experts: int) -> dict[str, Any]:
    """Cache to loads by text, and of all texts by layer."""
    found: dict[str, Any] = {}
    for share in SHARES:
        slots = min(trace.num_experts, experts_in_share(share, num_experts))
        for policy in POLICIES:
            done = simulate(trace, slots, policy, reset_between_sequences=True)
            loads = np.stack([one.loads[COMPLETION] for one in done.per_sequence])
            found[f"{policy} {share:g}"] = loads.sum(1).astype(int).tolist()
            if policy == "lfu":
                found[f"{policy} {share:g} by layer"] = loads.sum(0).astype(int).tolist()
    return found


def _pinned(
    kind: str, uses: dict[str, np.ndarray], kinds: list[str], slots: int
) -> dict[str, list[float]]:
    """Rule to what the set that it names misses in each text."""
    own = uses[kind]
    whole, count = own.sum(1), len(own)
    of_kind = {one: uses[one].sum((0, 1)) for one in kinds}
    everything = sum(of_kind.values())
    others = whole.sum(0) - whole  # what the other texts of the kind chose
    found: dict[str, list[float]] = {}

    def add(rule: str, popular: Any, counts: np.ndarray) -> None:
        found[rule] = [round(_missed(popular[n], counts[n], slots), 3) for n in range(count)]

    add("global", [everything - (whole[n] if kind in kinds else 0) for n in range(count)], whole)
    add("kind", others, whole)
    elsewhere = [
        [_missed(of_kind[one], whole[n], slots) for one in kinds if one != kind]
        for n in range(count)
    ]
    found["other kind"] = np.round(np.mean(elsewhere, axis=1), 3).tolist()
    add("other sequence", np.roll(whole, 1, axis=0), whole)
    add("own", whole, whole)
    add("first half", own[:, 0], own[:, 1])
    add("kind, second half", others, own[:, 1])
    return found


def _missed(popular: np.ndarray, counts: np.ndarray, slots: int) -> float:
    """Uses of a text that the *slots* most popular experts of each layer do not serve."""
    held = np.argsort(-popular, axis=-1, kind="stable")[:, :slots]
    return float(counts.sum() - np.take_along_axis(counts, held, axis=-1).sum())
