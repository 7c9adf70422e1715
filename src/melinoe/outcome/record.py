"""All models measured alike, and the result in the fine-tuned one's ``melinoe.json``."""

import time
from collections.abc import Callable, Sequence
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
from melinoe.outcome.change import change_of
from melinoe.outcome.control import as_checkpoint, check_control
from melinoe.outcome.model import Measured, Say, Texts, measure_model, record_of

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
    say: Say | None = None,
) -> dict[str, Any]:
    """
    Measure a fine-tuned checkpoint and its base, and write the outcome into its ``melinoe.json``.

    With a *control*, what the locality terms cost and bought is stated too.

    Args:
        directory: The fine-tuned checkpoint, with the ``melinoe.json`` that fine-tuning wrote.
        base: The checkpoint it was fine-tuned from: a directory or hub name.
        held_out: One name to examples of the kind that it was fine-tuned on and never saw; their
            prompts are also answered and traced.
        others: Names to other texts, for what was lost outside the domain.
        control: Directory of the run's control (`melinoe.finetune.taught.train_control`): a
            checkpoint, or an adapter alone, which is merged for a while into a directory beside
            *directory*.
        settings: How much to measure.
        device: Where the models run.
        say: Told of progress.

    Returns:
        All of ``melinoe.json``.

    Raises:
        DataError: no held-out text, or one whose prompts get no completion.
        CheckpointError: a checkpoint or its ``melinoe.json`` cannot be read, or *control* is none
            of this run. If it is the control that fails, the outcome of the other two is recorded.
        WriteError: no room to merge the control; likewise.
    """
    sized = settings or OutcomeSettings()
    metadata = read_metadata(directory)
    capacity = float(metadata.get("settings", {}).get("capacity", FinetuneSettings().capacity))
    outcome = measure_outcome(
        base,
        directory,
        held_out,
        others,
        capacity,
        sized,
        device,
        say,
        control=control,
        keep=lambda known: update_metadata(directory, outcome=known),
    )
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
    known = read_metadata(directory)
    kept, teacher = known.get("data") or {}, known.get("teacher")
    if teacher and Path(teacher["source"]).expanduser().is_dir():  # a path is nobody's business
        name = Path(teacher["source"]).expanduser().resolve().name
        more_known = {"teacher": {**teacher, "source": name}}
    else:
        more_known = {}
    return update_metadata(directory, **describe_base(base), **more_known, data={**kept, **data})


def measure_outcome(
    base: str | Path,
    tuned: str | Path,
    held_out: Texts,
    others: Texts | None = None,
    capacity: float = 0.25,
    settings: OutcomeSettings | None = None,
    device: str = "cpu",
    say: Say | None = None,
    *,
    control: str | Path | None = None,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """
    Measure the models with every expert resident, and simulate smaller caches from their traces.

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
        control: As in `record_outcome`.
        keep: Told what is known before the control is measured, lest that fail.

    Returns:
        What ``melinoe.json`` keeps as ``outcome``; see `melinoe.checkpoint.metadata`.

    Raises:
        DataError, CheckpointError, WriteError: as `record_outcome`.
    """
    if len(held_out) != 1:
        raise DataError("name exactly one held-out text of the kind the model was fine-tuned on")
    settings = settings or OutcomeSettings()
    started = time.monotonic()
    about = describe(str(tuned))
    slots = experts_in_share(capacity, about.num_experts)
    sizes = cache_sizes(slots, about.num_experts)

    def measure(path: str | Path, what: str) -> Measured:
        if say is not None:
            say(f"measuring {what}")
        return measure_model(path, held_out, others or {}, sizes, settings, device, say)

    before = measure(base, "the model before fine-tuning")
    after = measure(tuned, "the model after fine-tuning")
    compared = around(slots, about.num_experts)
    outcome = {
        "examples": min(settings.examples, len(next(iter(held_out.values())))),
        "prompts": len(after.localities["writing"].experts),
        "max_new_tokens": settings.max_new_tokens,
        "slots": slots,
        **after.shape,
        "before": record_of(before, held_out),
        "after": record_of(after, held_out),
        "change": change_of(before, after, compared),
        "machine": machine(),
        "date": machine()["date"],
        "seconds": round(time.monotonic() - started, 1),
    }
    if control is None:
        return outcome
    if keep is not None:
        keep(outcome)
    known = check_control(control, read_metadata(tuned))
    with as_checkpoint(control, base, tuned) as path:
        plain = measure(path, "its control")
    if plain.shape != after.shape:
        raise CheckpointError(
            f"{control} is of another shape than {tuned}; give a control of the same base"
        )
    return {
        **outcome,
        "control": record_of(plain, held_out),
        "change_from_control": change_of(plain, after, compared),
        "control_run": {
            "name": Path(control).expanduser().resolve().name,
            "fingerprint": known.get("fingerprint"),
            "settings": known.get("settings"),
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def around(slots: int, num_experts: int) -> list[int]:
    """Half the slots, the slots, double the slots, as far as they are different and exist."""
    return sorted({max(1, slots // 2), slots, min(num_experts, 2 * slots)})


def cache_sizes(slots: int, num_experts: int) -> list[int]:
    """About sixteen sizes from few to all experts, *slots*, half and double of it among them."""
    step = max(1, num_experts // _CURVE_POINTS)
    return sorted({*range(step, num_experts + 1, step), *around(slots, num_experts), num_experts})
