"""Tell whether a run is the control of another, and open a control as a checkpoint."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from melinoe.checkpoint import describe, read_metadata
from melinoe.checkpoint.writing import check_room, reason_of
from melinoe.config.likeness import differences, for_locality, recorded
from melinoe.errors import CheckpointError, WriteError
from melinoe.finetune.saving import merge_adapter
from melinoe.whole_file import unfinished


def check_control(control: str | Path, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the ``melinoe.json`` of a run's control: its twin without its locality terms.

    *control* is the directory of a checkpoint, or of an adapter alone; *tuned* the run's own
    ``melinoe.json``. CheckpointError: no run there, or one that differs in more than those terms.
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

    Both are of the form of ``melinoe.json``; *ours* may be as much as is known before training.
    """

    def differ(one: Any, other: Any) -> bool:  # what either leaves out is not compared
        return one is not None and other is not None and one != other

    said, own = theirs.get("settings") or {}, ours.get("settings") or {}
    its_run, our_run = recorded(said), recorded(own)
    if not said or its_run is None:
        return "it has no melinoe.json that says how it was trained"
    if for_locality(said):
        return "it was trained with locality terms"
    if differ(theirs.get("base_fingerprint"), ours.get("base_fingerprint")):
        return "it was trained on another base model, whose routers differ"
    if own and our_run is not None:
        found = differences(own, said)
        for key in ("batch_size", "gradient_accumulation"):  # compared as the rows of a step
            found.pop(key, None)
        if found:
            return ", ".join(
                f"{name} {its} in it and {our} in this run" for name, (our, its) in found.items()
            )
        its_rows, our_rows = (
            run.batch_size * run.gradient_accumulation * of["processes"]
            if of.get("processes")
            else None
            for run, of in ((its_run, theirs), (our_run, ours))
        )
        if differ(its_rows, our_rows):
            return f"{its_rows} rows a step in it and {our_rows} in this run"
    if "anchor" in theirs and "anchor" in ours:
        one, other = ((side["anchor"] or {}).get("tokens_sha256") for side in (theirs, ours))
        if one != other:
            return "it had another anchor text"
    data, our_data = theirs.get("data") or {}, ours.get("data") or {}
    # One counts examples as they were given, the other those that were long enough to be learned.
    hashes = data.get("tokens_sha256"), our_data.get("tokens_sha256")
    if differ(*hashes if all(hashes) else (data.get("examples"), our_data.get("examples"))):
        return "it was trained on other data"
    return None


@contextmanager
def as_checkpoint(control: str | Path, base: str | Path, beside: str | Path) -> Iterator[Path]:
    """
    Give the control as a checkpoint that can be loaded, for as long as the block lasts.

    An adapter alone is merged into a directory beside *beside*, which is deleted afterwards: the
    base is in memory once and on the disk once. CheckpointError: there is neither, or the adapter
    is torn or of another base. WriteError: the disk cannot take the merged checkpoint.
    """
    path, place = Path(control).expanduser(), Path(beside).expanduser().absolute()
    if (path / "config.json").is_file():
        yield path
        return
    with ExitStack() as gone:
        try:
            temporary = gone.enter_context(unfinished(place.with_name(f"{place.name}.control")))
            about = describe(str(base))
            check_room(temporary, about.expert_bytes + about.backbone_bytes)
            merge_adapter(path, temporary / "merged", str(base))
        except (OSError, WriteError) as error:
            raise WriteError(
                f"the control {control} cannot be merged beside {place} to be measured "
                f"({reason_of(error)})"
            ) from error
        yield temporary / "merged"
