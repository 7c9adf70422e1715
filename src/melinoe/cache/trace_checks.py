"""What a trace's arrays must be to each other; one that is inconsistent is no evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from melinoe.cache.trace_file import ARRAYS
from melinoe.errors import TraceError

if TYPE_CHECKING:
    from melinoe.cache.trace import Trace

PROMPT_ROW, COMPLETION_ROW, PADDING_ROW = 0, 1, 2


def check_arrays(trace: Trace) -> None:
    """
    Refuse a trace whose arrays do not fit each other or the header.

    Raises:
        TraceError: they do not; the sentence says which and how.
    """

    def refuse(fault: str) -> None:
        raise TraceError(f"the trace is malformed: {fault}; record it again")

    for name, dtype in ARRAYS.items():
        array = getattr(trace, name)
        if not isinstance(array, np.ndarray) or array.dtype != dtype:
            refuse(f"{name} is not an array of {np.dtype(dtype).name}")
        if array.ndim != (3 if name == "experts" else 1):
            refuse(f"{name} has {array.ndim} dimensions")
        if len(array) != len(trace.experts):
            refuse(f"{name} has {len(array)} rows where experts has {len(trace.experts)}")
    if trace.scores is not None and (
        getattr(trace.scores, "dtype", None) != np.float16
        or trace.scores.shape != trace.experts.shape
    ):
        refuse("its scores are not one float16 for each choice")
    if trace.scores is not None and not (np.isfinite(trace.scores) & (trace.scores >= 0)).all():
        refuse("a score is negative or no number")
    if trace.guesses is not None and (
        getattr(trace.guesses, "dtype", None) != np.int16
        or trace.guesses.shape != trace.experts.shape
    ):
        refuse("its guesses are not one int16 for each choice")
    if trace.num_layers < 1 or trace.top_k < 1:
        refuse(f"it has {trace.num_layers} layers and top-{trace.top_k} choices")
    if not 1 <= trace.num_experts <= np.iinfo(np.int16).max:
        refuse(f"it names {trace.num_experts} experts")
    if not len(trace.experts):
        return
    if trace.experts.min() < -1 or trace.experts.max() >= trace.num_experts:
        refuse(
            f"expert ids run from {trace.experts.min()} to {trace.experts.max()} "
            f"in a model of {trace.num_experts} experts"
        )
    if trace.guesses is not None and (
        trace.guesses.min() < -1 or trace.guesses.max() >= trace.num_experts
    ):
        refuse(f"it guesses ids from {trace.guesses.min()} to {trace.guesses.max()}")
    if trace.forward[0] < 0 or (np.diff(trace.forward) < 0).any():
        refuse("the numbers of forward passes decrease")
    if trace.sequence.min() < 0:
        refuse("a sequence number is negative")
    if trace.kind.max() > PADDING_ROW:
        refuse(f"row kind {trace.kind.max()} is unknown")
