"""Time what misses cost the engine beside their transfers, on no strategy that is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np

from melinoe.cache.counters import COMPLETION
from melinoe.cache.timing import Machine
from melinoe.engine.handle import Handle
from melinoe.engine.rehearsal import (
    LOADS,
    MOTIONS,
    Motion,
    Rehearsal,
    figures_from,
    time_calls,
)
from melinoe.generate import generate

_PROMPTS, _TOKENS, _REPEATS = 2, 16, 3


def rehearse(model: Any, handle: Handle, tokenizer: Any, prompts: Sequence[Any]) -> Machine | None:
    """
    Go through the motions of misses with every expert resident (`melinoe.engine.rehearsal`).

    Two prompts of up to 16 tokens, three times each, all motions in random order; a motion's time
    is the mean over prompts of the medians.

    Args:
        model, handle: With a slot for every expert.
        tokenizer: The model's.
        prompts: Some to generate from.

    Returns:
        The figures; None where there are none: on a GPU, where the host does not wait for what it
        began, or where no prompt got a second token.
    """
    if model.device.type != "cpu":
        return None
    rehearsal = Rehearsal(handle)
    motions = list(MOTIONS)
    times: dict[Motion, list[float]] = {motion: [] for motion in motions}
    loads = passes = 0
    order = Random(0)
    for prompt in prompts[:_PROMPTS]:
        runs: dict[Motion, list[float]] = {motion: [] for motion in motions}
        for _ in range(_REPEATS):
            order.shuffle(motions)
            for motion in motions:
                with rehearsal.doing(motion):
                    done = generate(model, handle, tokenizer, prompt, _TOKENS)
                if not done.decode_tokens or done.counters is None:
                    return None
                runs[motion].append((done.seconds - done.ttft_s) / done.decode_tokens)
                if motion == LOADS:
                    loads += int(done.counters.loads[COMPLETION].sum())
                    passes += done.decode_tokens
        for motion, taken in runs.items():
            times[motion].append(float(np.median(taken)))
    seconds = {motion: float(np.mean(taken)) for motion, taken in times.items()}
    return figures_from(seconds, handle, loads / passes, time_calls(handle))
