"""Both models measured alike, and the result in the fine-tuned one's ``melinoe.json``."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melinoe.checkpoint import (
    describe,
    describe_base,
    describe_data,
    read_metadata,
    update_metadata,
)
from melinoe.config import FinetuneSettings, OutcomeSettings, experts_in_share
from melinoe.data import Example
from melinoe.errors import DataError
from melinoe.measure import machine
from melinoe.outcome.change import change_of
from melinoe.outcome.model import Say, Texts, measure_model, record_of

_CURVE_POINTS = 16


def record_outcome(
    directory: str | Path,
    base: str | Path,
    held_out: Texts,
    others: Texts | None = None,
    *,
    settings: OutcomeSettings | None = None,
    device: str = "cpu",
    say: Say | None = None,
) -> dict[str, Any]:
    """
    Measure a fine-tuned checkpoint and its base, and write the outcome into its ``melinoe.json``.

    Args:
        directory: The fine-tuned checkpoint, with the ``melinoe.json`` that fine-tuning wrote.
        base: The checkpoint it was fine-tuned from: a directory or hub name.
        held_out: One name to examples of the kind that it was fine-tuned on and never saw; their
            prompts are also answered and traced.
        others: Names to other texts, for what was lost outside the domain.
        settings: How much to measure.
        device: Where the models run.
        say: Told of progress.

    Returns:
        All of ``melinoe.json``.

    Raises:
        DataError: no held-out text, or one whose prompts get no completion.
        CheckpointError: a checkpoint or its ``melinoe.json`` cannot be read.
    """
    sized = settings or OutcomeSettings()
    metadata = read_metadata(directory)
    capacity = float(metadata.get("settings", {}).get("capacity", FinetuneSettings().capacity))
    outcome = measure_outcome(base, directory, held_out, others, capacity, sized, device, say)
    return update_metadata(directory, outcome=outcome)


def record_origin(
    directory: str | Path,
    base: str | Path,
    source: str | Path | None,
    examples: Sequence[Example],
    split: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """
    Write into ``melinoe.json`` what a checkpoint was made from, and return all of the file.

    Args:
        directory: The checkpoint.
        base: The checkpoint that it was fine-tuned from.
        source: The training data, as it was given.
        examples: What of it was trained on.
        split: Split of a hub data set.
        more: Further facts about the data, such as how many examples were held out.

    Raises:
        CheckpointError: as `read_metadata`.
    """
    data = {**describe_data(source, examples, split), **more}
    kept = read_metadata(directory).get("data") or {}
    return update_metadata(directory, **describe_base(base), data={**kept, **data})


def measure_outcome(
    base: str | Path,
    tuned: str | Path,
    held_out: Texts,
    others: Texts | None = None,
    capacity: float = 0.25,
    settings: OutcomeSettings | None = None,
    device: str = "cpu",
    say: Say | None = None,
) -> dict[str, Any]:
    """
    Measure both models with every expert resident, and simulate smaller caches from their traces.

    Args:
        base: The model before.
        tuned: The model after.
        held_out: As in `record_outcome`.
        others: As in `record_outcome`.
        capacity: Share of a layer's experts that the model was trained for; half and double of it
            are among the cache sizes.
        settings: How much to measure.
        device: Where the models run.
        say: Told of progress.

    Returns:
        What ``melinoe.json`` keeps as ``outcome``; see `melinoe.checkpoint.metadata_schema`.

    Raises:
        DataError, CheckpointError: as `record_outcome`.
    """
    if len(held_out) != 1:
        raise DataError("name exactly one held-out text of the kind the model was fine-tuned on")
    settings = settings or OutcomeSettings()
    started = time.monotonic()
    about = describe(str(tuned))
    slots = experts_in_share(capacity, about.num_experts)
    sizes = cache_sizes(slots, about.num_experts)
    found = {}
    for name, path in (("before", base), ("after", tuned)):
        if say is not None:
            say(f"measuring the model {name} fine-tuning")
        found[name] = measure_model(path, held_out, others or {}, sizes, settings, device, say)
    before, after = found["before"], found["after"]
    return {
        "examples": min(settings.examples, len(next(iter(held_out.values())))),
        "prompts": len(after.localities["writing"].experts),
        "max_new_tokens": settings.max_new_tokens,
        "slots": slots,
        **after.shape,
        **{side: record_of(found[side], held_out) for side in found},
        "change": change_of(before, after, around(slots, about.num_experts)),
        "machine": machine(),
        "date": machine()["date"],
        "seconds": round(time.monotonic() - started, 1),
    }


def around(slots: int, num_experts: int) -> list[int]:
    """Half the slots, the slots, double the slots, as far as they are different and exist."""
    return sorted({max(1, slots // 2), slots, min(num_experts, 2 * slots)})


def cache_sizes(slots: int, num_experts: int) -> list[int]:
    """About sixteen sizes from few to all experts, *slots*, half and double of it among them."""
    step = max(1, num_experts // _CURVE_POINTS)
    return sorted({*range(step, num_experts + 1, step), *around(slots, num_experts), num_experts})
