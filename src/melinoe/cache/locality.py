"""Locality: how few experts suffice for how long, read off a trace's completions."""

from collections.abc import Iterator

import numpy as np

from melinoe.cache.trace import COMPLETION_ROW, PADDING_ROW, PROMPT_ROW, Trace


def experts_per_sequence(trace: Trace) -> np.ndarray:
    """Distinct experts that each sequence's completion used, mean over layers; nan without one."""
    result = np.full(trace.num_sequences, np.nan)
    for sequence, used in _uses(trace):
        result[sequence] = used.any(axis=0).sum(axis=1).mean()
    return result


def reuse(trace: Trace) -> np.ndarray:
    """
    Share of a token's experts that the sequence's previous token used in the same layer; nan
    without.

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
    """Count the experts that all completion tokens used, int64 (layers,): few is collapse."""
    counts = _choices(trace, trace.kind == COMPLETION_ROW)
    return (counts > 0).sum(axis=1)


def popularity(trace: Trace, *, prompts_only: bool = False) -> np.ndarray:
    """Count the choices of each expert, without padding: int64 (layers, experts)."""
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
