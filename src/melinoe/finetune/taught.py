"""Train the plain run first, then learn locality from it as well as from the data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from melinoe.checkpoint.metadata import read_metadata
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import TrainingError
from melinoe.finetune.resume.finished import check_place
from melinoe.finetune.resume.state import check_same_settings
from melinoe.finetune.run import FinetuneResult, finetune


def finetune_taught(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: str | Path,
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    **options: Any,
) -> FinetuneResult:
    """
    Fine-tune a checkpoint with a plain run on the same data as the teacher.

    The teacher is what `train_teacher` writes, beside *out* as ``<out>.teacher``, and stays there.

    Args:
        model_path, data, out, settings: As in `finetune`.
        resume: As in `finetune`, whichever of the two runs was interrupted.
        options: Others of `finetune`. The teacher gets no anchor text.

    Raises:
        TrainingError: as `train_teacher` and `finetune`.

    Cost: two trainings, of which the second has a forward pass more per batch.
    """
    path = check_place(out, resume)
    place = train_teacher(
        model_path, data, beside(path, "teacher"), settings, resume=resume, **options
    )
    return finetune(model_path, data, path, settings, teacher=place, resume=resume, **options)


def train_teacher(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: Path,
    settings: FinetuneSettings,
    **options: Any,
) -> Path:
    """
    Train on next tokens alone (`FinetuneSettings.plain`), and write the adapter that teaches.

    Args:
        model_path, data, settings: Of the run that will learn from it.
        out: Directory of the adapter.
        options: Of `finetune`; anchor text is not used.

    Returns:
        *out*.

    Raises:
        TrainingError: as `train_beside`; or *settings* have no term that learns from a teacher.
    """
    if not settings.is_taught:
        raise TrainingError(
            "lambda_match and lambda_distill are 0, so there is nothing to learn from a teacher; "
            "set lambda_match"
        )
    options.pop("anchor_examples", None)
    return train_beside(model_path, data, out, settings.plain(), **options)


def train_control(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: Path,
    settings: FinetuneSettings,
    **options: Any,
) -> Path:
    """
    Train the control of a run (`FinetuneSettings.control`), and write its adapter.

    Args:
        model_path, data, settings: Of the run that will be held against it.
        out: Directory of the adapter.
        options: Of `finetune`, as the run itself gets them: the same teacher and anchor text.

    Returns:
        *out*.

    Raises:
        TrainingError: as `train_beside`; or *settings* have no locality term.
    """
    if settings.is_control:
        raise TrainingError(
            "the run has no locality terms, so it is its own control; compare it with nothing"
        )
    return train_beside(model_path, data, out, settings.control(), **options)


def train_beside(
    model_path: str | Path,
    data: str | Path | Sequence[Example],
    out: Path,
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    **options: Any,
) -> Path:
    """
    Train a run that another one needs, and write its adapter; with *resume*, take what is there.

    Raises:
        TrainingError: as `finetune`; or, resumed, what is there came of other settings.
    """
    if resume and (done := read_metadata(out)):
        check_same_settings(out, done.get("settings") or {}, settings)
    else:
        finetune(model_path, data, out, replace(settings, save="adapter"), resume=resume, **options)
    return out


def beside(out: str | Path, what: str) -> Path:
    """Name the place of the run *out*'s ``teacher`` or ``control``: ``<out>.<what>``."""
    path = Path(out).expanduser()
    return path.with_name(f"{path.name}.{what}")
