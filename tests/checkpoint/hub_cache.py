"""A hub's local cache in its real layout: refs, snapshots of links, blobs."""

import hashlib
import os
import shutil
from pathlib import Path


def commit_id(number: int) -> str:
    """40 hexadecimal digits, as git has them."""
    return f"{number:040x}"


def add_snapshot(
    cache: Path, name: str, files: Path, commit: str, ref: str | None = "main"
) -> Path:
    """
    Put a directory's files into *cache* as one commit of *name*, as a download would.

    Blobs are named by their contents, snapshots link to them, and ``refs/<ref>`` holds the commit.
    """
    root = cache / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in files.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, root / "blobs" / digest)
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", digest))
    if ref is not None:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


def empty_cache(place: Path, monkeypatch) -> Path:
    """An empty cache at *place*, where transformers and the hub's client look for it."""
    from huggingface_hub import constants

    place.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    return place
