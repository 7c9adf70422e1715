"""
Write a run's result: a plain checkpoint, an adapter in PEFT's files, or both; merge an adapter.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melinoe.checkpoint.backbone import load_model
from melinoe.checkpoint.files import is_directory, split_revision
from melinoe.checkpoint.metadata import describe_base, read_metadata, write_metadata
from melinoe.checkpoint.opening import open_checkpoint
from melinoe.checkpoint.safetensors_file import check_same
from melinoe.checkpoint.tokenizer import copy_tokenizer, load_tokenizer
from melinoe.checkpoint.writing import (
    check_output,
    round_as_stored,
    whole_directory,
    write_model,
)
from melinoe.config import FinetuneSettings
from melinoe.errors import CheckpointError
from melinoe.finetune.adapter import (
    Adapter,
    adapter_of,
    read_adapter,
    read_adapter_config,
    write_adapter,
)
from melinoe.finetune.parts import TrainedParts
from melinoe.finetune.teacher import ADAPTER_DIRECTORY
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.moe.routing import find_routers, fingerprint


class KeptParts:
    """
    Keeps what the result needs of the trained parts, before they are merged into the model.

    Call it with the parts while they are still in float32: it copies the routers, the names of
    what changed and, if it will be written, the adapter.

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
        Compare rounding with training: norm of the routers' rounding over norm of their change.

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
    """Name a base so that PEFT finds it from any directory; PEFT takes no commit behind an @."""
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


def merge_adapter(
    adapter: str | Path, out: str | Path, base: str | Path | None = None
) -> dict[str, Any]:
    """
    Write base and adapter as one checkpoint, which needs neither PEFT nor Melinoe.

    The updates are added to the base's weights in place, expert by expert, in float32, and rounded
    once to the base's own type; routers too are rounded to it.

    Args:
        adapter: Directory that fine-tuning or PEFT wrote.
        out: Directory to make; must not exist, or be empty.
        base: Checkpoint directory or hub name; absent: the one that the adapter names.

    Returns:
        The checkpoint's ``melinoe.json``: the adapter's, with the merged model's fingerprint, and
        the base's entries where the adapter has none.

    Raises:
        OutputExistsError: *out* is taken.
        CheckpointError: no adapter, a torn one, or one of another base; a base that is changed
            meanwhile.
        UnsupportedModelError: the base has no experts.
        BudgetError: the host has no memory for the base's weights.

    Cost: the base in memory once, in its own type.
    """
    path = check_output(out)
    config, metadata = read_adapter_config(adapter), read_metadata(Path(adapter).expanduser())
    name = str(base) if base is not None else _base_of(str(adapter), config, metadata)
    try:
        with open_checkpoint(name) as checkpoint:
            source = checkpoint.source  # of one commit, also where the branch moves meanwhile
            size, stamps = checkpoint.stored_bytes, checkpoint.stamps
            check_host_room(size, f"{format_bytes(size)} of weights", "merge on a host with more")
            load_tokenizer(source, checkpoint.config)
            model = load_model(checkpoint)
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"the base that {adapter} names cannot be opened ({error}); say with --base where it is"
        ) from error
    _check_fingerprint(model, metadata, str(adapter), name)
    merged = read_adapter(adapter, model)
    merged.apply(model)
    with open_checkpoint(source) as checkpoint:
        round_as_stored(model, checkpoint, merged.names())
    metadata = {**describe_base(name), **metadata, "fingerprint": fingerprint(model)}
    check_same(stamps)  # what did not change is copied from the base's files now
    write_model(model, source, path, metadata, merged.names())
    return read_metadata(path)


def _base_of(adapter: str, config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """
    The path in PEFT's file, if there still is something; else what the run was told.

    A path that leads nowhere is looked for beside the adapter, where both were moved together.
    """
    path, told = config.get("base_model_name_or_path"), metadata.get("base")
    if path:
        here = Path(adapter).expanduser().absolute()
        for place in (Path(path).expanduser(), here / path, here.with_name(Path(path).name)):
            if (place / "config.json").is_file():
                return str(place)  # of a directory, melinoe.json keeps the name alone
    if not (name := told or path):
        raise CheckpointError(f"{adapter} does not name the model it was trained on; give --base")
    return str(name)


def _check_fingerprint(model: Any, metadata: dict[str, Any], adapter: str, base: str) -> None:
    """PEFT's own adapters say nothing of their base; ours do."""
    wanted = metadata.get("base_fingerprint")
    if wanted is not None and fingerprint(model) != wanted:
        raise CheckpointError(
            f"{adapter} was trained on another model than {base}: their routers differ "
            f"(its base was {metadata.get('base', 'not named')}); give its own base with --base"
        )
