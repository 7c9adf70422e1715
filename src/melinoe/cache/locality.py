"""
Locality: how few experts suffice for how long, read off a trace without any cache.

All of it looks at completion tokens, because the prompt is computed at once.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from melinoe.cache.policy import Policy
from melinoe.cache.residency import Residency
from melinoe.cache.trace import COMPLETION_ROW, PADDING_ROW, PROMPT_ROW, Trace
from melinoe.errors import MelinoeError


def experts_per_sequence(trace: Trace) -> np.ndarray:
    """Distinct experts that each sequence's completion used, mean over layers; nan without one."""
    result = np.full(trace.num_sequences, np.nan)
    for sequence, used in _uses(trace):
        result[sequence] = used.any(axis=0).sum(axis=1).mean()
    return result


def reuse(trace: Trace) -> np.ndarray:
    """
    Share of a token's experts that the sequence's previous token used in the same layer.

    Counted over all layers and completion tokens that have a previous token; the first one's is
    the last token of the prompt. Choices of no expert are left out; nan for a sequence without.

    Source:
        Expert overlap ratio (EOR) as in arXiv:2605.27081, per sequence here.
    """
    result = np.full(trace.num_sequences, np.nan)
    for sequence in np.unique(trace.sequence).tolist():
        rows = np.flatnonzero((trace.sequence == sequence) & (trace.kind != PADDING_ROW))
        decodes = trace.kind[rows[1:]] == COMPLETION_ROW
        now, then = trace.experts[rows[1:][decodes]], trace.experts[rows[:-1][decodes]]
        again = (now[..., :, None] == then[..., None, :]).any(axis=-1) & (now >= 0)
        if (now >= 0).any():
            result[sequence] = again.sum() / (now >= 0).sum()
    return result


def distinct_experts(trace: Trace) -> np.ndarray:
    """
    Distinct experts that the completion tokens of the whole trace used, int64 (layers,).

    A small number here is collapse; a small number per sequence is locality.
    """
    counts = _choices(trace, trace.kind == COMPLETION_ROW)
    return (counts > 0).sum(axis=1)


def popularity(trace: Trace, *, prompts_only: bool = False) -> np.ndarray:
    """
    Choices of each expert, in prompts and completions without padding: int64 (layers, experts).
    """
    return _choices(trace, trace.kind == PROMPT_ROW if prompts_only else trace.kind != PADDING_ROW)


def _choices(trace: Trace, rows: np.ndarray) -> np.ndarray:
    """Choices of each expert in some rows, int64 (layers, experts)."""
    counts = np.empty((trace.num_layers, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):  # a layer at a time: a copy of all choices may be large
        chosen = trace.experts[rows, layer]
        counts[layer] = np.bincount(chosen[chosen >= 0], minlength=trace.num_experts)
    return counts


def _uses(trace: Trace) -> Iterator[tuple[int, np.ndarray]]:
    """Of each sequence with a completion, the experts each token used: bool (tokens, layers, E)."""
    for sequence in range(trace.num_sequences):
        chosen = trace.completion(sequence)
        used = np.zeros((len(chosen), trace.num_layers, trace.num_experts + 1), bool)
        np.put_along_axis(used, chosen.astype(np.int64) % (trace.num_experts + 1), True, axis=2)
        if len(chosen):
            yield sequence, used[..., :-1]  # -1 has fallen into the extra one


def srp(trace: Trace, m: int, *, by_layer: bool = False) -> float | np.ndarray:
    """
    SRP(m): the best F1 of deciding once per segment and expert, for all its m tokens alike.

    Every m consecutive completion tokens of a sequence are a segment (overlapping ones too). In a
    segment an expert is either taken or not; the decision is best made by how often the segment
    uses it, so the taken are those used at least *a* times, with the one threshold *a* that is best
    for all segments together. F1 counts (token, expert) pairs: those taken and used twice, over
    those taken plus those used. 1 means that segments use their experts in every token.

    Args:
        trace: Sequences shorter than *m* are left out; MelinoeError if all are.
        m: Tokens of a segment, 1 or more.
        by_layer: The best threshold and value of each layer, float64 (layers,), instead of all; nan
            for one that its segments do not use.
    """
    if m < 1:
        raise ValueError(f"a segment has at least one token, not {m}")
    layers = trace.num_layers
    seen = np.zeros((layers, m + 1))  # pairs of segment and expert, by uses in the segment
    for _, used in _uses(trace):
        total = np.cumsum(np.concatenate([np.zeros_like(used[:1]), used]), axis=0, dtype=np.int64)
        counts = total[m:] - total[:-m]  # nothing where the sequence is shorter
        for layer in range(layers):
            seen[layer] += np.bincount(counts[:, layer].ravel(), minlength=m + 1)
    if not seen.any():
        raise MelinoeError(
            f"no sequence has a segment of {m} completion tokens; generate longer ones, or take "
            "shorter segments"
        )
    each = [_best_f1(row) for row in seen]
    return np.array(each) if by_layer else _best_f1(seen.sum(axis=0))


def _best_f1(seen: np.ndarray) -> float:
    """The best threshold's F1, from how many (segment, expert) pairs have each number of uses."""
    m = len(seen) - 1
    matches = np.cumsum((seen * np.arange(m + 1))[::-1])[::-1]
    taken = np.cumsum(seen[::-1])[::-1] * m
    return float((2 * matches / (taken + matches[0])).max()) if matches[0] else math.nan


def sch(trace: Trace, m: int, rho: float, *, by_layer: bool = False) -> float | np.ndarray:
    """
    SCH(m, rho): hit rate of a cache of rho x K slots that sees m tokens ahead.

    Each layer of each sequence has an empty cache of ``round(rho * K)`` slots at its first
    completion token. A token's experts are loaded together; who leaves is the expert, not of this
    token, that the next *m* tokens of the sequence use least, of equal ones the least recently
    used. First uses count as misses. The published code counts the current token as the first of
    the *m*; this does not.

    More foresight is not better: the rule counts uses and not how soon they come, so for large *m*
    it keeps what is used often but late.

    Args:
        trace: Its completion tokens.
        m: Tokens that are seen ahead, 0 or more; 0 is LRU.
        rho: Slots per layer as a multiple of top-k, 1 or more.
        by_layer: Of each layer, float64 (layers,), instead of all; nan for one without a use.
    """
    if m < 0 or rho < 1:
        raise ValueError(f"m is {m} and rho {rho}; a cache sees 0 or more tokens and holds one's")
    slots = int(rho * trace.top_k + 0.5)
    hits, uses = np.zeros(trace.num_layers), np.zeros(trace.num_layers)
    for _, used in _uses(trace):
        for layer in range(trace.num_layers):
            requests = [np.flatnonzero(token).tolist() for token in used[:, layer]]
            cache = Residency(trace.num_experts, slots, _SeesAhead(requests, m))
            for request in requests:
                uses[layer] += len(request)
                hits[layer] += len(cache.request(request).hits)
    if not uses.any():
        raise MelinoeError("the trace has no completion to count; record a longer one")
    if by_layer:
        return np.where(uses > 0, hits, np.nan) / np.maximum(uses, 1)
    return float(hits.sum() / uses.sum())


class _SeesAhead(Policy):
    """Evict who is used least by the next *m* requests, then who was used longest ago."""

    def __init__(self, requests: Sequence[Sequence[int]], m: int):
        self._requests = [request for request in requests if request]
        self._m = m

    def reset(self, num_experts: int) -> None:
        self._ahead = np.zeros(num_experts, np.int64)
        self._stamp = np.full(num_experts, -1)
        self._now = -1
        for request in self._requests[: self._m]:
            self._ahead[list(request)] += 1

    def use(self, experts: Sequence[int]) -> None:
        self._now += 1
        if self._m:
            self._ahead[list(experts)] -= 1
            for request in self._requests[self._now + self._m : self._now + self._m + 1]:
                self._ahead[list(request)] += 1
        self._stamp[list(experts)] = self._now

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        return sorted(candidates, key=lambda e: (self._ahead[e], self._stamp[e], e))[:count]
