"""Train the NLL-only run first, then learn locality from it as well as from the data."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from melinoe.checkpoint.metadata import read_metadata
from melinoe.checkpoint.writing import check_output
from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import TrainingError
from melinoe.finetune.price.reference import FREE_OF_CONTROL
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
    Fine-tune a checkpoint with its own NLL-only control as the teacher.

    The control is what *settings* would give without any term but next tokens: same examples in the
    same order, same steps. It is written beside *out*, as an adapter in ``<out>.control``, and
    stays there. Then `finetune` runs with it as the ``teacher``.

    Args:
        model_path, data, out, settings: As in `finetune`.
        resume: As in `finetune`, whichever of the two runs was interrupted.
        options: Others of `finetune`. The control gets no anchor text.

    Raises:
        TrainingError: as `finetune`; no term that learns from a teacher; or, resumed, a control
            that other settings gave.

    Cost: two trainings, of which the second has a forward pass more per batch.
    """
    if not settings.is_taught:
        raise TrainingError(
            "lambda_match and lambda_distill are 0, so there is nothing to learn from the control; "
            "set lambda_match"
        )
    path = check_output(out)
    place = control_place(path)
    plain = replace(settings.control(), save="adapter")
    if resume and (done := read_metadata(place)):
        free = (FREE_OF_CONTROL - {"keep"}) | {"capacity", "own_texts"}
        check_same_settings(place, done.get("settings") or {}, plain, free)
    else:
        own = {key: value for key, value in options.items() if key != "anchor_examples"}
        finetune(model_path, data, place, plain, resume=resume, **own)
    return finetune(model_path, data, path, settings, teacher=place, resume=resume, **options)


def control_place(out: str | Path) -> Path:
    """Where `finetune_taught` writes the control of the run *out*."""
    path = Path(out).expanduser()
    return path.with_name(f"{path.name}.control")
