"""Texts that commands read beside a model: those to measure on, and those kept from training."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FEWEST = 8  # held-out examples below which an interval says nothing
Texts = dict[str, Sequence[Any]]  # names to examples


def _name_of(source: str) -> str:
    """Give a text's short name: that of a file or directory without path and ending."""
    return Path(source).stem if Path(source).exists() else source


def _others(sources: Sequence[str], split: str, limit: int | None, taken: Collection[str]) -> Texts:
    """Read other texts, each file of a directory by itself; the whole name where one is *taken*."""
    from melinoe.data import data_files, load_examples

    texts: Texts = {}
    for source in sources:
        for file in map(str, data_files(source) if Path(source).is_dir() else [source]):
            short = _name_of(file)
            name = file if short in texts or short in taken else short
            texts[name] = load_examples(file, split=split, limit=limit)
    return texts


def named_texts(
    data: str, other: Sequence[str], split: str, limit: int | None, columns: str | None
) -> dict[str, tuple[Sequence[Any], bool]]:
    """Name of each text to its examples and whether it is the one in domain, that one first."""
    from melinoe.data import load_examples

    name, examples = _name_of(data), load_examples(data, split=split, limit=limit, columns=columns)
    others = _others(other, split, limit, {name})
    return {name: (examples, True)} | {other: (text, False) for other, text in others.items()}


@dataclass(frozen=True)
class HeldOut:
    """Examples that training never sees."""

    train: Sequence[Any]  # what is left to train on
    domain: str  # name of the text
    examples: Sequence[Any] = ()  # held out of it, or given apart; empty if there are too few
    others: Texts = field(default_factory=dict)  # texts of other kinds


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
    """Keep *eval_data* from training, data of the same kind, or else a *share* of *examples*."""
    from melinoe.data import load_examples

    domain = _name_of(data if eval_data is None else eval_data)
    others = _others(other, eval_split, limit, {domain})
    if eval_data is not None:
        held_out = load_examples(eval_data, split=eval_split, limit=limit, columns=columns)
        return HeldOut(examples, domain, held_out, others)
    if (count := int(share * len(examples))) < _FEWEST:
        return HeldOut(examples, domain, (), others)
    # Evenly spread, because files are often sorted by topic.
    chosen = {int((index + 0.5) * len(examples) / count) for index in range(count)}
    kept = [one for index, one in enumerate(examples) if index not in chosen]
    return HeldOut(kept, domain, [examples[index] for index in sorted(chosen)], others)
