"""Several texts by name: what `evaluate` reads, and `finetune` measures on."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any


def name_of(source: str) -> str:
    """A text's short name: of a file or directory without its path and ending."""
    return Path(source).stem if Path(source).exists() else source


def other_texts(
    sources: Sequence[str], split: str, limit: int | None, taken: Collection[str] = ()
) -> dict[str, Sequence[Any]]:
    """
    Read other texts: name to examples, the source itself its name where the short one is taken.

    Args:
        sources: Files, directories of them, each file a text of its own, or hub data sets.
        split: Of hub data sets.
        limit: Read only so many rows of each.
        taken: Names that are not free.

    Raises:
        DataError: a text that cannot be read, or a directory without any.
    """
    from melinoe.data import data_files, load_examples

    texts: dict[str, Sequence[Any]] = {}
    for source in sources:
        files = [str(file) for file in data_files(source)] if Path(source).is_dir() else [source]
        for file in files:
            short = name_of(file)
            name = file if short in texts or short in taken else short
            texts[name] = load_examples(file, split=split, limit=limit)
    return texts


def named_texts(
    data: str | None,
    other: Sequence[str],
    split: str,
    limit: int | None,
    columns: str | None = None,
) -> dict[str, tuple[Sequence[Any], bool]]:
    """Name of each text to its examples and whether it is the one in domain, that one first."""
    from melinoe.data import load_examples

    texts: dict[str, tuple[Sequence[Any], bool]] = {}
    if data is not None:
        texts[name_of(data)] = (
            load_examples(data, split=split, limit=limit, columns=columns),
            True,
        )
    others = other_texts(other, split, limit, list(texts))
    return texts | {name: (examples, False) for name, examples in others.items()}
