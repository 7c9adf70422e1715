"""What `melinoe finetune` measures besides training: held-out data chosen before, used after."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """

    train: Sequence[Any]
    domain: str
    examples: Sequence[Any] = ()
    others: dict[str, Sequence[Any]] = field(default_factory=dict)


def hold_out(
    data: str,
    examples: Sequence[Any],
    eval_data: str | None,
    eval_split: str,
    other: Sequence[str],
    share: float,
    limit: int | None = None,
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

    Raises:
        DataError: a text that cannot be read.
    """
    from melinoe.data import load_examples

    domain = name_of(data if eval_data is None else eval_data)
    others = other_texts(other, eval_split, limit, {domain})
    if eval_data is not None:
        held_out = load_examples(eval_data, split=eval_split, limit=limit)
        return HeldOut(examples, domain, held_out, others)
    count = int(share * len(examples))
    if count < _FEWEST:
        return HeldOut(examples, domain, (), others)
    # Evenly spread, because files are often sorted by topic.
    chosen = {int((index + 0.5) * len(examples) / count) for index in range(count)}
    kept = [one for index, one in enumerate(examples) if index not in chosen]
    return HeldOut(kept, domain, [examples[index] for index in sorted(chosen)], others)


def finish(
    out: Path, base: str, data: str, split: str, held_out: HeldOut, measure: bool = True
) -> None:
    """
    Complete a fine-tuned checkpoint: its origin, its measured outcome, its card.

    Only the first process of a distributed run does it.

    Raises:
        TrainingError: measuring failed; the checkpoint itself is whole.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from melinoe.outcome import record_origin, record_outcome
    from melinoe.report.card import write_card

    record_origin(out, base, data, held_out.train, split, held_out=len(held_out.examples))
    if measure and not held_out.examples:
        options.say(
            "too few examples to hold some out, so nothing was measured before and after; give "
            "--eval-data"
        )
    elif measure:
        try:
            record_outcome(
                out,
                base,
                {held_out.domain: held_out.examples},
                held_out.others,
                device=options.resolve_device("auto"),
                say=options.say,
            )
        except MelinoeError as error:
            raise TrainingError(
                f"{out} is written and whole, but could not be measured ({error}); measure it with "
                "`melinoe evaluate`"
            ) from error
    write_card(out)
    options.say(f"wrote {out}/README.md and its figures")
