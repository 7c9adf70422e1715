"""The NLL-only run that a price is stated against: whether it is one, and as a checkpoint."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from melinoe.checkpoint import describe, read_metadata
from melinoe.checkpoint.unfinished import unfinished
from melinoe.checkpoint.writing import check_room
from melinoe.config import FinetuneSettings
from melinoe.errors import CheckpointError, TrainingError, WriteError
from melinoe.finetune.parts.merging import merge_adapter
from melinoe.finetune.price.reference import FREE_OF_CONTROL

# What may differ between a run and its control: it changes no weight of the control, or is
# accounted for by the rows of a step.
_FREE = (FREE_OF_CONTROL - {"keep"}) | {
    "capacity", "own_texts", "batch_size", "gradient_accumulation",
}  # fmt: skip


def check_control(control: str | Path, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """
    Refuse as a control what is not the NLL-only twin of a fine-tuned model.

    Args:
        control: Directory of a run: a checkpoint, or an adapter alone.
        tuned: What the fine-tuned model's ``melinoe.json`` holds. What either file leaves out is
            not compared.

    Returns:
        What the control's ``melinoe.json`` holds.

    Raises:
        CheckpointError: no run there, or one on another base, with other settings, on other data,
            or with more than the next-token loss; the sentence says which.
    """
    path = Path(control).expanduser()
    theirs = read_metadata(path) if path.is_dir() else {}
    if why := why_no_control(theirs, tuned):
        raise CheckpointError(
            f"{control} is no control of this run: {why}; give the directory of a run with "
            "--control on the same base and data, with otherwise the same settings"
        )
    return theirs


def why_no_control(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """
    Say why one run is not the NLL-only control of another; ``None`` if it is.

    Args:
        theirs: What the one's ``melinoe.json`` holds.
        ours: The same of the other, or as much as is known before it is trained.
    """
    recorded = _settings(theirs)
    if not theirs.get("settings") or recorded is None:
        return "it has no melinoe.json that says how it was trained"
    if not recorded.is_control:
        return "it was trained on more than next tokens"
    if _differ(theirs.get("base_fingerprint"), ours.get("base_fingerprint")):
        return "it was trained on another base model, whose routers differ"
    own = _settings(ours)
    named = (theirs.get("settings") or {}).keys() & (ours.get("settings") or {}).keys() - _FREE
    if own is not None and named:
        there, here = _plain(recorded), _plain(own)
        if odd := [name for name in sorted(named & there.keys()) if there[name] != here[name]]:
            return ", ".join(f"{name} {there[name]} there and {here[name]} here" for name in odd)
        if _differ(_rows(recorded, theirs), _rows(own, ours)):
            return f"{_rows(recorded, theirs)} rows a step there and {_rows(own, ours)} here"
    data, our_data = theirs.get("data") or {}, ours.get("data") or {}
    # One counts examples as they were given, the other those that were long enough to be learned.
    hashes = data.get("tokens_sha256"), our_data.get("tokens_sha256")
    told = hashes if all(hashes) else (data.get("examples"), our_data.get("examples"))
    if _differ(*told):
        return "it was trained on other data"
    return None


@contextmanager
def as_checkpoint(control: str | Path, base: str | Path, beside: str | Path) -> Iterator[Path]:
    """
    The control as a checkpoint that can be loaded, for as long as the block lasts.

    An adapter alone is merged into a directory beside *beside*, which is gone afterwards; a
    checkpoint is what it is.

    Raises:
        CheckpointError: neither is there, or the adapter is torn or of another base.
        WriteError: the disk cannot take the merged checkpoint.

    Cost: of an adapter, the base in memory once and on the disk once.
    """
    path, place = Path(control).expanduser(), Path(beside).expanduser().absolute()
    if (path / "config.json").is_file():
        yield path
        return
    with ExitStack() as gone:
        try:
            temporary = gone.enter_context(unfinished(place.with_name(f"{place.name}.control")))
        except OSError as error:
            raise WriteError(
                f"the control {control} cannot be merged beside {place} to be measured "
                f"({error.strerror}); make {place.parent} writable"
            ) from error
        _merge(path, temporary / "merged", str(base))
        yield temporary / "merged"


def _merge(adapter: Path, out: Path, base: str) -> None:
    about = describe(base)
    try:
        check_room(out, about.expert_bytes + about.backbone_bytes)
        merge_adapter(adapter, out, base)
    except WriteError as error:
        raise WriteError(
            f"the control {adapter} cannot be merged to be measured ({error})"
        ) from error


def _settings(metadata: Mapping[str, Any]) -> FinetuneSettings | None:
    """
    The settings of a run; those that this release does not know are left out.

    A term that a record does not name was not there yet: it is off, whatever its default is now.
    """
    known = {one.name for one in fields(FinetuneSettings)}
    found = metadata.get("settings") or {}
    try:
        off = FinetuneSettings().control()
        return replace(off, **{name: found[name] for name in known & found.keys()})
    except (TrainingError, TypeError, ValueError):
        return None


def _plain(settings: FinetuneSettings) -> dict[str, Any]:
    """As JSON would give it back: a record's lists are no tuples."""
    return json.loads(json.dumps(asdict(settings)))


def _rows(settings: FinetuneSettings, metadata: Mapping[str, Any]) -> int | None:
    """Rows of an optimiser step, over all processes; ``None`` where nobody counted those."""
    processes = metadata.get("processes")
    if processes is None:
        return None
    return settings.batch_size * settings.gradient_accumulation * processes


def _differ(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one != other
