"""Measure base, fine-tuned model and control alike, and record it in ``melinoe.json``."""

import time
from collections.abc import Mapping, Sequence
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
from melinoe.errors import CheckpointError, DataError
from melinoe.measure import machine
from melinoe.outcome.control import as_checkpoint, check_control
from melinoe.outcome.model import Measured, Say, Texts, change_of, measure_model

_CURVE_POINTS = 16


def record_outcome(
    directory: str | Path,
    base: str | Path,
    held_out: Texts,
    others: Texts | None = None,
    *,
    control: str | Path | None = None,
    settings: OutcomeSettings | None = None,
    device: str = "cpu",
    memory: Mapping[str, Any] | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """
    Measure a fine-tuned checkpoint and its base, and write the outcome into its ``melinoe.json``.

    Smaller caches are simulated from traces, among them those of half and of double the slots that
    the model was trained for.

    With a *control*, the price and the saving of the locality terms are recorded too.

    Args:
        directory: The fine-tuned checkpoint, with the ``melinoe.json`` that fine-tuning wrote.
        base: The checkpoint it was fine-tuned from: a directory or hub name.
        held_out: One name to examples of the kind that it was fine-tuned on and never saw; their
            prompts are also answered and traced.
        others: Names to other texts, for the loss outside the domain.
        control: Directory of the run's control: a checkpoint, or an adapter alone, which is
            merged for a while into a directory beside *directory*.
        settings: How much to measure.
        device: Where the models run.
        memory: What `melinoe.load` is given of it, as ``gpu_memory``; absent: all experts are
            resident. It changes no number.
        say: Told of progress.

    Returns:
        All of ``melinoe.json``.

    Raises:
        DataError: no held-out text, or one whose prompts get no completion.
        CheckpointError: a checkpoint or its ``melinoe.json`` cannot be read, or *control* is none
            of this run. If it is the control that fails, the outcome of the other two is recorded.
        WriteError: no room to merge the control; likewise.
    """
    if len(held_out) != 1:
        raise DataError("name exactly one held-out text of the kind the model was fine-tuned on")
    settings = settings or OutcomeSettings()
    started = time.monotonic()
    metadata = read_metadata(directory)
    capacity = float(metadata.get("settings", {}).get("capacity", FinetuneSettings().capacity))
    num_experts = describe(str(directory)).num_experts
    slots = experts_in_share(capacity, num_experts)
    sizes, compared = cache_sizes(slots, num_experts), around(slots, num_experts)

    def measure(path: str | Path, what: str) -> Measured:
        if say is not None:
            say(f"measuring {what}")
        return measure_model(path, held_out, others or {}, sizes, settings, device, memory, say)

    before = measure(base, "the model before fine-tuning")
    after = measure(directory, "the model after fine-tuning")
    facts = machine()
    outcome = {
        "examples": min(settings.examples, len(next(iter(held_out.values())))),
        "prompts": len(after.experts["writing"]),
        "max_new_tokens": settings.max_new_tokens,
        "slots": slots,
        **after.shape,
        "before": before.record,
        "after": after.record,
        "change": change_of(before, after, compared),
        "machine": facts,
        "date": facts["date"],
        "seconds": round(time.monotonic() - started, 1),
    }
    recorded = update_metadata(directory, outcome=outcome)
    if control is None:
        return recorded
    known = check_control(control, recorded)
    with as_checkpoint(control, base, directory) as path:
        plain = measure(path, "its control")
    if plain.shape != after.shape:
        raise CheckpointError(
            f"{control} is of another shape than {directory}; give a control of the same base"
        )
    outcome |= {
        "control": plain.record,
        "change_from_control": change_of(plain, after, compared),
        "control_run": {
            "name": Path(control).expanduser().resolve().name,
            "fingerprint": known.get("fingerprint"),
            "settings": known.get("settings"),
        },
        "seconds": round(time.monotonic() - started, 1),
    }
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
    Record a checkpoint's base and data in ``melinoe.json``, and return all of the file.

    Args:
        directory: The checkpoint.
        base: The checkpoint that it was fine-tuned from.
        source: The training data, as it was given.
        examples: Those that were trained on.
        split: Split of a hub data set.
        more: Further facts about the data, such as how many examples were held out.

    Raises:
        CheckpointError: as `read_metadata`.
    """
    known = read_metadata(directory)
    data = {**(known.get("data") or {}), **describe_data(source, examples, split), **more}
    return update_metadata(directory, **describe_base(base), data=data)


def around(slots: int, num_experts: int) -> list[int]:
    """Return half the slots, the slots and double the slots, as far as they exist."""
    return sorted({max(1, slots // 2), slots, min(num_experts, 2 * slots)})


def cache_sizes(slots: int, num_experts: int) -> list[int]:
    """Return about sixteen sizes up to all experts, with *slots*, half and double of it."""
    step = max(1, num_experts // _CURVE_POINTS)
    return sorted({*range(step, num_experts + 1, step), *around(slots, num_experts), num_experts})
