"""A training run's log as a record."""

from collections.abc import Mapping, Sequence
from typing import Any

from melinoe.errors import DataError


def training_record(
    model: str, log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Return the record of kind ``training``.

    Args:
        model: Label of the run.
        log: One mapping per logged step, with ``step`` and the terms: ``loss``, ``nll``,
            ``cache``, ``rank``, …; entries without a step (summaries) are left out.
        settings: What the run was told.

    Raises:
        DataError: no step was logged.
    """
    steps = [dict(entry) for entry in log if "step" in entry]
    if not steps:
        raise DataError("the training run logged no step; log at least one")
    return {"kind": "training", "model": model, "log": steps, "settings": dict(settings)}
