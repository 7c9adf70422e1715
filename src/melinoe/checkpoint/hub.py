"""Find one file of a checkpoint: in a directory, in the hub's local cache, or on the hub."""

from pathlib import Path

from transformers.utils import cached_file

from melinoe.errors import CheckpointError


def is_directory(name: str) -> bool:
    """Tell a directory from a name on the hub."""
    return Path(name).expanduser().is_dir()


def split_revision(name: str) -> tuple[str, str | None]:
    """
    Split ``"org/model@v1.0"`` at the ``@``; without one the revision is None.

    A directory is never split, whatever its name.
    """
    if is_directory(name) or "@" not in name:
        return name, None
    repository, _, revision = name.partition("@")
    return repository, revision or None


def hub_arguments(name: str) -> dict[str, str]:
    """Return the arguments by which transformers' ``from_pretrained`` takes *name*."""
    repository, revision = split_revision(name)
    return {"pretrained_model_name_or_path": repository, "revision": revision or "main"}


def pinned(name: str, path: Path) -> str:
    """
    Add to *name* the commit that *path*, one of its files, came from; not to a directory.

    A branch can move between two downloads, and then config, index and shards would be of
    different commits. It also spares the question to the hub: what the cache has of a commit is
    final.
    """
    if is_directory(name) or path.parent.parent.name != "snapshots":
        return name
    return f"{split_revision(name)[0]}@{path.parent.name}"


def commit_of(source: str) -> str | None:
    """Return the commit in a name that `pinned` gave; None for a directory."""
    return None if is_directory(source) else split_revision(source)[1]


def locate(name: str, filename: str, download: bool = True) -> Path | None:
    """
    Find one file of a checkpoint; None where the checkpoint has no such file.

    Args:
        name: A directory, or a repository on the hub: ``org/model``, ``org/model@revision``.
        filename: The file's name inside it.
        download: Fetch a hub file that is not in the local cache; without it such a file counts
            as absent, as it does where the hub cannot be reached (or ``HF_HUB_OFFLINE`` is set).

    Raises:
        CheckpointError: the path does not exist or is a file; the hub refuses or fails; there is
            no such repository or revision.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        path = directory / filename
        return path if path.is_file() else None
    if directory.exists():
        raise CheckpointError(f"{name} is a file; give the directory that holds the checkpoint")
    repository, revision = split_revision(name)
    if repository.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"the directory {name} does not exist; check the path")
    try:
        found = cached_file(
            repository,
            filename,
            revision=revision,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=download,
        )
    except Exception as error:  # the hub's client lets through errors of many libraries
        raise CheckpointError(
            f"{name} is no directory here, and the hub did not give {filename} "
            f"({first_line(error)}); check the name, the network and the room on the disk"
        ) from None
    return None if found is None else Path(found)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
