"""Where a fine-tuned model comes from: its base and the base's terms, its data and their hash."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melinoe.checkpoint.hub import locate
from melinoe.data import Example, data_files, digest
from melinoe.errors import CheckpointError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def describe_base(name: str | Path) -> dict[str, Any]:
    """
    Say what a base model is called and under which terms, as ``melinoe.json`` holds it.

    Args:
        name: A directory, or the name of a repository on the hub.

    Returns:
        ``base``: the hub name, or the directory's own name, for a path is nobody else's business;
        ``base_model``: the hub name, else ``None``; ``license``: what the base's card says, else
        ``None``; ``language`` likewise.
    """
    is_directory = Path(name).expanduser().is_dir()
    card = read_card(name)
    license, language = card.get("license"), card.get("language")
    return {
        "base": Path(name).expanduser().resolve().name if is_directory else str(name),
        # A revision behind an @ is ours alone; the hub's cards name repositories.
        "base_model": None if is_directory else str(name).partition("@")[0],
        "license": license if isinstance(license, str) else None,
        "language": language if isinstance(language, str | list) else None,
    }


def read_card(name: str | Path) -> dict[str, Any]:
    """The front matter of a checkpoint's README.md; empty where there is none to read."""
    try:
        path = locate(str(name), "README.md")
    except CheckpointError:  # offline, and the cache holds no card: it says nothing
        path = None
    if path is None:
        return {}
    # Imported here: it loads YAML, and only cards need it.
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path)
    except Exception:  # a card is free text: what is not YAML says nothing
        return {}
    return found if isinstance(found, dict) else {}


def describe_data(
    source: str | Path | None, examples: Sequence[Example], split: str | None = None
) -> dict[str, Any]:
    """
    Say what a model was trained on, so that somebody else can tell whether they have the same.

    Args:
        source: The file, directory or hub data set that was given; ``None`` if there was none.
        examples: The examples that were read.
        split: Split of a hub data set.

    Returns:
        ``source``: the hub name, or the name of the file or directory; ``hub``: whether it is on
        the hub; ``split``, ``examples``; ``sha256``: of the file's bytes, of a directory's files
        one after the other, or, from the hub, of the examples as JSON lines; ``sha256_of``:
        which of these.
    """
    path = None if source is None else Path(source)
    local = path is not None and path.exists()
    files = hashlib.sha256()
    if path is not None and local:
        for file in data_files(path):
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    files.update(block)
    return {
        "source": path.resolve().name if path is not None and local else source and str(source),
        "hub": bool(path is not None and not local and _HUB_NAME.match(str(source))),
        "split": None if local or source is None else split,
        "examples": len(examples),
        "sha256": files.hexdigest() if local else digest(examples),
        "sha256_of": ("files" if path is not None and path.is_dir() else "file")
        if local
        else "examples",
    }
