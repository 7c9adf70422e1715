"""
Locality: how few experts suffice for how long, read off a trace without any cache.

All of it looks at completion tokens, because the prompt is computed at once.
"""

import numpy as np

from melinoe.cache.trace import COMPLETION_ROW, PADDING_ROW, PROMPT_ROW, Trace


def experts_per_sequence(trace: Trace) -> np.ndarray:
    """
    Distinct experts that each sequence's completion tokens used, mean over layers.

    Returns:
        float64 (num_sequences,), nan for a sequence without completion tokens.
    """
    result = np.full(trace.num_sequences, np.nan)
    for sequence, rows in _rows_by_sequence(trace, trace.kind == COMPLETION_ROW):
        result[sequence] = _used(trace, rows).sum(axis=1).mean()
    return result


def reuse(trace: Trace) -> np.ndarray:
    """
    Share of a token's experts that the sequence's previous token used in the same layer.

    Counted over all layers and completion tokens that have a previous token; the first one's is
    the last token of the prompt. Choices of no expert are left out.

    Returns:
        float64 (num_sequences,), nan for a sequence with no such token.

    Source:
        Expert overlap ratio (EOR) as in arXiv:2605.27081, per sequence here.
    """
    result = np.full(trace.num_sequences, np.nan)
    for sequence, rows in _rows_by_sequence(trace, trace.kind != PADDING_ROW):
        tokens = rows[1:][trace.kind[rows[1:]] == COMPLETION_ROW]
        before = rows[:-1][trace.kind[rows[1:]] == COMPLETION_ROW]
        now, then = trace.experts[tokens], trace.experts[before]
        chosen = now >= 0
        again = (now[..., :, None] == then[..., None, :]).any(axis=-1) & chosen
        if chosen.any():
            result[sequence] = again.sum() / chosen.sum()
    return result


def distinct_experts(trace: Trace) -> np.ndarray:
    """
    Distinct experts that the completion tokens of the whole trace used, int64 (layers,).

    A small number here is collapse; a small number per sequence is locality.
    """
    return _used(trace, np.flatnonzero(trace.kind == COMPLETION_ROW)).sum(axis=1)


def popularity(trace: Trace, *, prompts_only: bool = False) -> np.ndarray:
    """
    How often each expert was chosen, prompts and completions, padding not: int64 (layers, experts).
    """
    wanted = trace.kind == PROMPT_ROW if prompts_only else trace.kind != PADDING_ROW
    counts = np.empty((trace.num_layers, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):  # a layer at a time: a copy of all choices may be large
        choices = trace.experts[wanted, layer]
        counts[layer] = np.bincount(choices[choices >= 0], minlength=trace.num_experts)
    return counts


def _rows_by_sequence(trace: Trace, wanted: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Row numbers of each sequence that has any wanted rows, in the order they ran."""
    rows = np.flatnonzero(wanted)
    rows = rows[np.argsort(trace.sequence[rows], kind="stable")]
    sequences, starts = np.unique(trace.sequence[rows], return_index=True)
    return (
        list(zip(sequences.tolist(), np.split(rows, starts[1:]), strict=True)) if rows.size else []
    )


def _used(trace: Trace, rows: np.ndarray) -> np.ndarray:
    """Which experts the rows used, bool (layers, num_experts)."""
    used = np.zeros((trace.num_layers, trace.num_experts + 1), dtype=bool)
    choices = trace.experts[rows]
    used[np.arange(trace.num_layers)[None, :, None], choices] = True  # -1 falls into the extra one
    return used[:, :-1]
