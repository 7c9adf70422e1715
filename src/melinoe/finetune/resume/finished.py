"""Runs that were written and not completed: a resumed call takes what is there for its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melinoe.checkpoint.metadata import METADATA, read_metadata
from melinoe.checkpoint.writing import check_output
from melinoe.config import FinetuneSettings
from melinoe.data import Encoded
from melinoe.errors import TrainingError
from melinoe.finetune.resume.state import check_same_settings, data_fingerprint


def check_place(out: str | Path, resume: bool) -> Path:
    """
    The directory *out*, if a run may be written there, or, to *resume*, one was.

    Raises:
        OutputExistsError: it is taken.
    """
    path = Path(out).expanduser()
    return path if is_written(path, resume) else check_output(path)


def is_written(path: Path, resume: bool) -> bool:
    """Whether a resumed run's result is there: it appears whole, with its record, or not at all."""
    return resume and (path / METADATA).is_file()


def finished_run(
    path: Path, settings: FinetuneSettings, data: Sequence[Encoded], base_fingerprint: str
) -> Mapping[str, Any]:
    """
    Read the record of a run that was written, and make sure that it is the one that is asked for.

    Args:
        path: Of the run.
        settings: As they are asked for now.
        data: Likewise.
        base_fingerprint: Of the model that would be trained.

    Raises:
        TrainingError: other settings, data or base model; the message names what differs.
    """
    metadata = read_metadata(path)
    check_same_settings(path, metadata.get("settings") or {}, settings)
    for what, there, here in (
        ("data", (metadata.get("data") or {}).get("tokens_sha256"), data_fingerprint(data)),
        ("base model", metadata.get("base_fingerprint"), base_fingerprint),
    ):
        if there != here:
            raise TrainingError(
                f"{path} is a run with another {what}; give what it was given, or delete it"
            )
    return metadata
