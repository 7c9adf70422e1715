"""What a run writes in the end: a plain checkpoint, the adapter in PEFT's files, or both."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melinoe.checkpoint.hub import is_directory, split_revision
from melinoe.checkpoint.metadata import write_metadata
from melinoe.checkpoint.tokenizer import copy_tokenizer
from melinoe.checkpoint.writing import whole_directory, write_model
from melinoe.config import FinetuneSettings
from melinoe.finetune.parts.adapter import Adapter, adapter_of
from melinoe.finetune.parts.adapter_files import write_adapter
from melinoe.finetune.parts.adapters import TrainedParts
from melinoe.moe.routing import find_routers

ADAPTER_DIRECTORY = "adapter"
"""Where the adapter lies in a checkpoint that was saved with it."""


class KeptParts:
    """
    What is kept of the trained parts before they become the model's own weights.

    Called with them while they are still in float32. Keeps the routers, the names of what changed
    and, if it will be written, the adapter.

    Args:
        model: Before training.
        settings: ``save`` is read.
    """

    def __init__(self, model: Any, settings: FinetuneSettings) -> None:
        self.save = settings.save
        self.adapter: Adapter | None = None
        self.changed: list[str] = []
        self._before = _router_weights(model)
        self._trained: dict[str, Tensor] = {}

    def __call__(self, parts: TrainedParts) -> None:
        """Collective under FSDP2: every process must call it."""
        if self.save != "merged":
            self.adapter = adapter_of(parts)
        self.changed = parts.names()
        self._trained = {name: _whole(parameter) for name, parameter in parts.router.items()}

    def router_rounding(self, model: Any) -> float:
        """
        What rounding took from the routers' training: norm of the rounding over norm of the change.

        Args:
            model: After training, its routers back in the checkpoint's own type. They must be:
                transformers and other engines read all of a checkpoint in one type.

        Returns:
            0 where nothing was rounded.
        """
        rounded = _router_weights(model)
        lost = sum(float((rounded[n] - w).square().sum()) for n, w in self._trained.items())
        change = sum(float((w - self._before[n]).square().sum()) for n, w in self._trained.items())
        return (lost / change) ** 0.5 if change else 0.0


def write_result(
    model: Any, base: str, out: str | Path, metadata: dict[str, Any], kept: KeptParts
) -> None:
    """
    Write what the run's ``save`` asks for, whole or not at all.

    ``merged`` gives a plain checkpoint; ``adapter`` a directory for PEFT and for `merge_adapter`;
    ``both`` the checkpoint with that directory in it. ``melinoe.json`` lies beside each.

    Args:
        model: From `load_model`, with what was trained in it.
        base: What it was loaded from, of one commit where it is a name on the hub.
        out: The directory to make.
        metadata: For ``melinoe.json``.
        kept: Of the run.

    Raises:
        OutputExistsError, CheckpointError, WriteError: as `write_model`.
    """
    adapter, generates = kept.adapter, hasattr(model, "prepare_inputs_for_generation")

    def write_files(directory: Path) -> None:
        assert adapter is not None
        write_adapter(adapter, directory, _where(base), generates=generates)
        write_metadata(directory, metadata)

    def write_beside(directory: Path) -> None:
        (directory / ADAPTER_DIRECTORY).mkdir()
        write_files(directory / ADAPTER_DIRECTORY)

    if kept.save != "adapter":
        also = write_beside if kept.save == "both" else None
        write_model(model, base, out, metadata, kept.changed, also)
        return
    with whole_directory(out) as directory:
        write_files(directory)
        copy_tokenizer(base, directory)


def _where(base: str) -> str:
    """The name by which PEFT finds a base from any directory; it takes no commit behind an @."""
    if is_directory(base):
        return str(Path(base).expanduser().resolve())
    return split_revision(base)[0]


def _router_weights(model: Any) -> dict[str, Tensor]:
    return {
        name: _whole(parameter)
        for router in find_routers(model)
        for name, parameter in router.parameters()
    }


def _whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().to("cpu", torch.float32, copy=True)
