"""Tell whether a run is the control of another, and open a control as a checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from melinoe.checkpoint import describe, read_metadata
from melinoe.checkpoint.writing import check_room
from melinoe.config import FinetuneSettings
from melinoe.config.likeness import differences, for_locality, recorded
from melinoe.errors import CheckpointError, WriteError
from melinoe.finetune.saving import merge_adapter
from melinoe.whole_file import unfinished

# Compared as the rows of a step.
_ROWS = {"batch_size", "gradient_accumulation"}


def check_control(control: str | Path, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """
    Refuse as a control what is not a fine-tuned model's twin without its locality terms.

    Args:
        control: Directory of a run: a checkpoint, or an adapter alone.
        tuned: The fine-tuned model's ``melinoe.json``. What either file leaves out is not compared.

    Returns:
        The control's ``melinoe.json``.

    Raises:
        CheckpointError: no run there, or one on another base, with other settings, another teacher
            or anchor text, on other data, or with locality terms; the sentence says which.
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
    Say why one run is not the like-for-like control of another; ``None`` if it is.

    It is one if nothing but the locality terms sets the two apart.

    Args:
        theirs: The ``melinoe.json`` of the one.
        ours: That of the other, or as much as is known before it is trained.
    """
    said = theirs.get("settings") or {}
    its_run = recorded(said)
    if not said or its_run is None:
        return "it has no melinoe.json that says how it was trained"
    if for_locality(said):
        return "it was trained with locality terms"
    if _differ(theirs.get("base_fingerprint"), ours.get("base_fingerprint")):
        return "it was trained on another base model, whose routers differ"
    own = ours.get("settings") or {}
    our_run = recorded(own)
    if own and our_run is not None:
        odd = {key: pair for key, pair in differences(own, said).items() if key not in _ROWS}
        if odd:
            lines = (
                f"{name} {its} in it and {our} in this run" for name, (our, its) in odd.items()
            )
            return ", ".join(lines)
        if _differ(_rows(its_run, theirs), _rows(our_run, ours)):
            its_rows, our_rows = _rows(its_run, theirs), _rows(our_run, ours)
            return f"{its_rows} rows a step in it and {our_rows} in this run"
    for key, what in (("teacher", "fingerprint"), ("anchor", "tokens_sha256")):
        if key in theirs and key in ours:  # what either leaves out is not compared
            one, other = ((side[key] or {}).get(what) for side in (theirs, ours))
            if one != other:
                return f"it had another {'teacher' if key == 'teacher' else 'anchor text'}"
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
    Give the control as a checkpoint that can be loaded, for as long as the block lasts.

    An adapter alone is merged into a directory beside *beside*, which is deleted afterwards; a
    checkpoint is given as it is.

    Raises:
        CheckpointError: there is neither, or the adapter is torn or of another base.
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


def _rows(settings: FinetuneSettings, metadata: Mapping[str, Any]) -> int | None:
    """Rows of an optimiser step over all processes; ``None`` where those were not counted."""
    processes = metadata.get("processes")
    if processes is None:
        return None
    return settings.batch_size * settings.gradient_accumulation * processes


def _differ(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one != other
