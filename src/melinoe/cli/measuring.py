"""What `melinoe finetune` measures besides training: held-out data chosen before, used after."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from melinoe.cli import options
from melinoe.cli.texts import name_of, other_texts
from melinoe.errors import MelinoeError, TrainingError

_FEWEST = 8  # held-out examples below which an interval says nothing


@dataclass(frozen=True)
class HeldOut:
    """
    Examples that training never sees.

    Attributes:
        train: What is left to train on.
        domain: Name of the text.
        examples: Held out of it, or given apart; empty if there are too few.
        others: Names to texts of other kinds.
        chosen_by: How many more there are, by which a search for a price chose.
    """

    train: Sequence[Any]
    domain: str
    examples: Sequence[Any] = ()
    others: dict[str, Sequence[Any]] = field(default_factory=dict)
    chosen_by: int = 0


def hold_out(
    data: str,
    examples: Sequence[Any],
    eval_data: str | None,
    eval_split: str,
    other: Sequence[str],
    share: float,
    limit: int | None = None,
    columns: str | None = None,
) -> HeldOut:
    """
    Decide what is kept from training, before any of it.

    Args:
        data: The training data's name.
        examples: What was read of it.
        eval_data: Held-out data of the same kind; then all of *examples* are trained on.
        eval_split: Split of it on the hub.
        other: Files, directories or hub names of other texts.
        share: Of *examples*, evenly spread, to hold out where *eval_data* is absent.
        limit: Read only so many rows of each.
        columns: What the columns of *eval_data* are.

    Raises:
        DataError: a text that cannot be read.
    """
    from melinoe.data import load_examples

    domain = name_of(data if eval_data is None else eval_data)
    others = other_texts(other, eval_split, limit, {domain})
    if eval_data is not None:
        held_out = load_examples(eval_data, split=eval_split, limit=limit, columns=columns)
        return HeldOut(examples, domain, held_out, others)
    count = int(share * len(examples))
    if count < _FEWEST:
        return HeldOut(examples, domain, (), others)
    # Evenly spread, because files are often sorted by topic.
    chosen = {int((index + 0.5) * len(examples) / count) for index in range(count)}
    kept = [one for index, one in enumerate(examples) if index not in chosen]
    return HeldOut(kept, domain, [examples[index] for index in sorted(chosen)], others)


def judges(held_out: HeldOut, base: str, max_length: int) -> HeldOut:
    """
    What of the held-out text a search for a price did not choose by: only that may say the price.

    Args:
        held_out: What the search was given.
        base: The checkpoint, for its tokenizer.
        max_length: Of the search; it leaves out what has no completion within it.
    """
    from melinoe.checkpoint import load_tokenizer
    from melinoe.checkpoint.files import read_config
    from melinoe.finetune.price.panel import halves

    tokenizer = load_tokenizer(base, read_config(base))
    joined = [(name, one) for name, some in held_out.others.items() for one in some]
    _, rest = halves([one for _, one in joined], tokenizer, max_length)
    others: dict[str, Sequence[Any]] = {
        name: [joined[index][1] for index in rest if joined[index][0] == name]
        for name in held_out.others
    }
    choosing, judging = halves(held_out.examples, tokenizer, max_length)
    return replace(
        held_out,
        examples=[held_out.examples[index] for index in judging],
        others={name: some for name, some in others.items() if some},
        chosen_by=len(choosing),
    )


def finish(
    out: Path,
    base: str,
    data: str,
    split: str,
    held_out: HeldOut,
    measure: bool = True,
    control: Path | None = None,
    columns: str | None = None,
    resume: bool = False,
) -> None:
    """
    Complete a fine-tuned checkpoint: its origin, its measured outcome, its card.

    Only the first process of a distributed run does it.

    Args:
        out: The checkpoint.
        base: What it was fine-tuned from.
        data: As it was given.
        split: Of a hub data set.
        held_out: What to measure on.
        measure: Whether to.
        control: To state the price against, or none.
        columns: What the columns of *data* are, as it was given.
        resume: Whether an outcome that is there already may be this one.

    Raises:
        TrainingError: measuring failed; the checkpoint itself is whole, and has a card of what was
            measured.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from melinoe.outcome import record_origin, record_outcome
    from melinoe.report.card import write_card

    kept: dict[str, Any] = {"held_out": len(held_out.examples) + held_out.chosen_by}
    if columns is not None:
        kept["columns"] = columns
    if held_out.chosen_by:
        kept["chosen_by"] = held_out.chosen_by
    record_origin(out, base, data, held_out.train, split, **kept)
    failed: TrainingError | None = None
    if measure and not held_out.examples:
        options.say(
            "too few examples to hold some out, so nothing was measured before and after; give "
            "--eval-data"
        )
    elif measure and not (resume and _is_measured(out, control)):
        try:
            record_outcome(
                out,
                base,
                {held_out.domain: held_out.examples},
                held_out.others,
                control=control,
                device=options.resolve_device("auto"),
                say=options.say,
            )
        except MelinoeError as error:
            failed = _unmeasured(out, control, error)
            failed.__cause__ = error
    write_card(out)
    options.say(f"wrote {out}/README.md and its figures")
    if failed is not None:
        raise failed


def _is_measured(out: Path, control: Path | None) -> bool:
    """Whether the outcome is there, and beside the control if there is one."""
    from melinoe.checkpoint import read_metadata

    outcome = read_metadata(out).get("outcome") or {}
    return bool(outcome) and (control is None or "control" in outcome)


def _unmeasured(out: Path, control: Path | None, error: MelinoeError) -> TrainingError:
    """What is there and what is not, after an error on the way to the outcome."""
    from melinoe.checkpoint import read_metadata

    if control is not None and read_metadata(out).get("outcome"):
        return TrainingError(
            f"{out} is written, whole and measured beside its base, but not beside the control "
            f"({error}); `melinoe evaluate {out} CONTROL` compares it with a checkpoint of one, "
            "which `melinoe merge` makes of an adapter"
        )
    return TrainingError(
        f"{out} is written and whole, but could not be measured ({error}); measure it with "
        "`melinoe evaluate`"
    )
