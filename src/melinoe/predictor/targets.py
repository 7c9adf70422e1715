"""Count how often each sequence of a trace used each expert, and what a guess would serve."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.errors import TraceError

Floats = NDArray[np.float64]


def use_counts(trace: Trace, kind: int, num_sequences: int | None = None) -> Floats:
    """
    Count how often each sequence chose each expert.

    Args:
        trace: The model's choices.
        kind: Which rows count: ``PROMPT_ROW`` or ``COMPLETION_ROW`` of `melinoe.cache.trace`.
        num_sequences: Rows of the result; ``None`` takes as many as the trace has.

    Returns:
        float64 ``(sequences, layers, num_experts)``; choices of "no expert" count nowhere.
    """
    sequences = trace.num_sequences if num_sequences is None else num_sequences
    rows = trace.kind == kind
    experts, sequence = trace.experts[rows].astype(np.int64), trace.sequence[rows].astype(np.int64)
    counts = np.zeros((sequences, trace.experts.shape[1], trace.num_experts))
    for layer in range(trace.experts.shape[1]):
        chosen = experts[:, layer, :]
        cells = (sequence[:, None] * trace.num_experts + chosen)[chosen >= 0]
        counts[:, layer, :] = np.bincount(cells, minlength=counts[:, layer, :].size).reshape(
            sequences, trace.num_experts
        )
    return counts


def check_prompts(trace: Trace, prompts: Sequence[Sequence[int]]) -> None:
    """
    Check prompts against the trace: one per sequence, each as long as its rows in the trace.

    Raises:
        TraceError: they are not the prompts that the trace was taken from.
    """
    if len(prompts) != trace.num_sequences:
        raise TraceError(
            f"the trace has {trace.num_sequences} sequences but {len(prompts)} prompts were "
            "given; give the prompts that it was recorded from, in their order"
        )
    rows = np.bincount(trace.sequence[trace.kind == PROMPT_ROW], minlength=len(prompts))
    for index, prompt in enumerate(prompts):
        if rows[index] != len(prompt):
            raise TraceError(
                f"sequence {index} of the trace has {rows[index]} prompt tokens but its prompt "
                f"has {len(prompt)}; give the prompts that it was recorded from, in their order"
            )


def shares(counts: Floats) -> Floats:
    """Turn counts into shares that sum to 1 over experts; a layer without counts stays 0."""
    totals = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)


def completion_shares(trace: Trace, prompts: Sequence[Sequence[int]]) -> tuple[Floats, Floats]:
    """
    Return each expert's share of the uses of the completion, and of those of the prompt.

    Returns:
        Two float64 ``(sequences, layers, num_experts)``.

    Raises:
        TraceError: the prompts are not the trace's.
    """
    check_prompts(trace, prompts)
    after = shares(use_counts(trace, COMPLETION_ROW, len(prompts)))
    return after, shares(use_counts(trace, PROMPT_ROW, len(prompts)))


def top_ids(scores: Floats, slots: int) -> NDArray[np.int64]:
    """Return the ids of the *slots* highest scores, best first; ties go to the lower id."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :slots]


def recall_at(target: Floats, scores: Floats, slots: int) -> Floats:
    """
    Return the share of uses that the *slots* best-scored experts of each layer would serve.

    That is the hit rate of a cache that holds those experts and never changes. Mean over the
    layers that the sequence used.

    Args:
        target: Shares ``(sequences, layers, num_experts)``, each layer summing to 1, or to 0 where
            the sequence did not use it.
        scores: Any scores of the same shape, or one that broadcasts to it; higher is likelier.
        slots: Experts taken from each layer.

    Returns:
        float64 ``(sequences,)``; nan for a sequence without a use.
    """
    chosen = top_ids(np.broadcast_to(scores, target.shape), slots)
    served = np.take_along_axis(target, chosen, axis=-1).sum(axis=-1).sum(axis=-1)
    used = (target.sum(axis=-1) > 0).sum(axis=-1)
    return np.where(used > 0, served, np.nan) / np.maximum(used, 1)
