"""Make an adapter and its base one plain checkpoint of the hub's layout."""

from pathlib import Path
from typing import Any

from torch import nn

from melinoe.checkpoint.backbone import load_model
from melinoe.checkpoint.metadata import describe_base, read_metadata
from melinoe.checkpoint.opening import open_checkpoint
from melinoe.checkpoint.safetensors_file import check_same
from melinoe.checkpoint.tokenizer import load_tokenizer
from melinoe.checkpoint.writing import check_output, round_as_stored, write_model
from melinoe.errors import CheckpointError
from melinoe.finetune.parts.adapter_files import read_adapter, read_adapter_config
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.moe.routing import fingerprint


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
        What the checkpoint's ``melinoe.json`` holds: the adapter's, with the fingerprint of now,
        and what is known of the base where the adapter does not say it.

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


def _check_fingerprint(model: nn.Module, metadata: dict[str, Any], adapter: str, base: str) -> None:
    """PEFT's own adapters say nothing of their base; ours do."""
    wanted = metadata.get("base_fingerprint")
    if wanted is not None and fingerprint(model) != wanted:
        raise CheckpointError(
            f"{adapter} was trained on another model than {base}: their routers differ "
            f"(its base was {metadata.get('base', 'not named')}); give its own base with --base"
        )
