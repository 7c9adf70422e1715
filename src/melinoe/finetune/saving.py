"""Write a run's result, a plain checkpoint, an adapter or both; merge an adapter."""

from pathlib import Path
from typing import Any

from melinoe.checkpoint.backbone import layers_of, load_backbone
from melinoe.checkpoint.files import is_directory, split_revision
from melinoe.checkpoint.metadata import (
    describe_base,
    read_metadata,
    update_metadata,
    write_metadata,
)
from melinoe.checkpoint.opening import open_checkpoint
from melinoe.checkpoint.pack import pack
from melinoe.checkpoint.safetensors_file import check_same
from melinoe.checkpoint.tokenizer import copy_tokenizer, load_tokenizer
from melinoe.checkpoint.writing import check_output, round_as_stored, whole_directory, write_model
from melinoe.errors import CheckpointError
from melinoe.finetune.adapter import (
    DIRECTORY,
    Adapter,
    read_adapter,
    read_adapter_config,
    write_adapter,
)
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.moe.routing import fingerprint
from melinoe.whole_file import unfinished


def write_result(
    model: Any,
    base: str,
    out: str | Path,
    metadata: dict[str, Any],
    save: str,
    adapter: Adapter,
    streamed: bool = False,
) -> None:
    """
    Write what *save* asks for, whole or not at all; ``melinoe.json`` lies beside each.

    *model* has what was trained in it; or *streamed*, from `load_backbone`, its experts' updates
    are in *adapter* alone. *base* is of one commit where it is a name on the hub. *save*:
    ``merged``, a plain checkpoint; ``adapter``, a directory for PEFT and `merge_adapter`; ``both``,
    the one in the other. Raises as `write_model`.
    """
    generates = hasattr(model, "prepare_inputs_for_generation")
    # A name by which PEFT finds the base from any directory; it takes no commit behind an @.
    here = is_directory(base)
    name = str(Path(base).expanduser().resolve()) if here else split_revision(base)[0]

    def write_files(directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        write_adapter(adapter, directory, name, generates=generates)
        write_metadata(directory, metadata)

    if save == "adapter":
        with whole_directory(out) as directory:
            write_files(directory)
            copy_tokenizer(base, directory)
        return
    also = (lambda directory: write_files(directory / DIRECTORY)) if save == "both" else None
    experts = adapter.expert if streamed else None
    write_model(model, base, out, metadata, adapter.names(), also, experts)


def merge_adapter(
    adapter: str | Path, out: str | Path, base: str | Path | None = None
) -> dict[str, Any]:
    """
    Write *base*, or the one that *adapter* names, and adapter as one checkpoint, which needs
    neither PEFT nor Melinoe.

    Experts are read one by one, updated in float32, and rounded once to the base's own type;
    routers too. Returns the checkpoint's ``melinoe.json``. Takes the base without its experts in
    memory, and one expert.

    OutputExistsError: *out* is taken. CheckpointError: no adapter, a torn one, or one of another
    base; a base that is changed meanwhile. UnsupportedModelError: the base has no experts.
    BudgetError: the host has no memory for the base's weights.
    """
    path = check_output(out)
    config, metadata = read_adapter_config(adapter), read_metadata(Path(adapter).expanduser())
    name = str(base) if base is not None else _base_of(str(adapter), config, metadata)
    try:
        with open_checkpoint(name) as checkpoint:
            source = checkpoint.source  # of one commit, also where the branch moves meanwhile
            size, stamps = checkpoint.backbone_bytes, checkpoint.stamps
            check_host_room(size, f"{format_bytes(size)} of weights", "merge on a host with more")
            load_tokenizer(source, checkpoint.config)
            model = load_backbone(checkpoint)
            layers = layers_of(checkpoint, model)
    except CheckpointError as error:
        if base is not None:
            raise
        raise CheckpointError(
            f"the base that {adapter} names cannot be opened ({error}); say with --base where it is"
        ) from error
    wanted = metadata.get("base_fingerprint")  # PEFT's own adapters say nothing of their base
    if wanted is not None and fingerprint(model) != wanted:
        raise CheckpointError(
            f"{adapter} was trained on another model than {name}: their routers differ "
            f"(its base was {metadata.get('base', 'not named')}); give its own base with --base"
        )
    merged = read_adapter(adapter, model, layers)
    merged.apply(model, experts=False)
    with open_checkpoint(source) as checkpoint:
        round_as_stored(model, checkpoint, merged.names())
    metadata = {**describe_base(name), **metadata, "fingerprint": fingerprint(model)}
    check_same(stamps)  # what did not change is copied from the base's files now
    write_model(model, source, path, metadata, merged.names(), experts=merged.expert)
    return read_metadata(path)


def _base_of(adapter: str, config: dict[str, Any], metadata: dict[str, Any]) -> str:
    """
    Find the base by PEFT's path, also if moved beside the adapter; else by what the run was told.
    """
    if path := config.get("base_model_name_or_path"):
        here = Path(adapter).expanduser().absolute()
        for place in (Path(path).expanduser(), here / path, here.with_name(Path(path).name)):
            if (place / "config.json").is_file():
                return str(place)  # of a directory, melinoe.json keeps the name alone
    if not (name := metadata.get("base") or path):
        raise CheckpointError(f"{adapter} does not name the model it was trained on; give --base")
    return str(name)


def merge_packed(
    adapter: str | Path, out: str | Path, format: str, base: str | Path | None = None
) -> tuple[dict[str, Any], float]:
    """
    Merge as `merge_adapter`, and pack the experts to *format*; the base may be packed itself.
    Returns also how far the packed experts are off the merged ones, as `pack`, and raises as both.
    Takes on the disk the merged checkpoint for a while, and a packed base unpacked.
    """
    path, metadata = check_output(out), read_metadata(Path(adapter).expanduser())
    name = str(base or _base_of(str(adapter), read_adapter_config(adapter), metadata))
    with unfinished(path.absolute().with_name(f"{path.name}.merged")) as work:
        with open_checkpoint(name) as checkpoint:
            packed = any(not source.format.exact for source in checkpoint.experts)
        if packed:
            pack(name, "plain", work / "base")
        merge_adapter(adapter, work / "merged", work / "base" if packed else name)
        off = pack(str(work / "merged"), format, path)
    about = describe_base(name)
    return update_metadata(path, **{key: metadata.get(key, about[key]) for key in about}), off
