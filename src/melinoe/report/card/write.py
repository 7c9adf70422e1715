"""Put a checkpoint's card and figures beside its weights."""

from pathlib import Path
from typing import Any

from melinoe.checkpoint import read_metadata
from melinoe.checkpoint.metadata import read_card
from melinoe.errors import CheckpointError, OutputExistsError, WriteError
from melinoe.report.card import figures
from melinoe.report.card.text import UNKNOWN, card_text, front_matter
from melinoe.whole_file import write_whole

CARD = "README.md"
FILES = {
    "losses": "melinoe-losses.png",
    "experts": "melinoe-experts.png",
    "hit_rates": "melinoe-hit-rates.png",
}
END = "<!-- `melinoe card` writes what stands above this line, and keeps what stands below. -->"


def write_card(directory: str | Path, overwrite: bool = False) -> list[Path]:
    """
    Write ``README.md`` and its figures from a checkpoint's ``melinoe.json``.

    The same ``melinoe.json`` gives the same files. What stands below the card's last line, and
    what a person put into its front matter, stays.

    Args:
        directory: The checkpoint.
        overwrite: Replace a ``README.md`` that this function did not write.

    Returns:
        The files written, the card first.

    Raises:
        CheckpointError: *directory* has no ``melinoe.json``, or a malformed one.
        OutputExistsError: it has another ``README.md``.
        WriteError: it cannot be written to.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise CheckpointError(f"{path} is no directory; give a fine-tuned checkpoint's")
    metadata = read_metadata(path)
    if not metadata:
        raise CheckpointError(
            f"{path} has no melinoe.json to write a card from; give a checkpoint that "
            "`melinoe finetune` wrote"
        )
    card = path / CARD
    # One that is no UTF-8 was not written by us.
    before = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    if before and END not in before and not overwrite:
        raise OutputExistsError(
            f"{card} was not written by melinoe; keep it, or replace it with --overwrite"
        )
    _, _, below = before.partition(END)
    adapter = not (path / "config.json").is_file() and (path / "adapter_config.json").is_file()
    header = _merged(front_matter(metadata, adapter), read_card(path) if END in before else {})
    licence = header["license"] if header["license"] != UNKNOWN else None
    drawn = _draw(metadata)
    names = {name: FILES[name] for name in drawn}
    body = card_text(path.resolve().name, metadata | {"license": licence}, names, adapter)
    try:
        for name, image in drawn.items():
            write_whole(path / FILES[name], image)
        write_whole(card, f"---\n{_yaml(header)}---\n\n{body}\n{END}\n{below.lstrip(chr(10))}")
    except OSError as error:
        raise WriteError(
            f"cannot write the card into {path} ({error.strerror}); make room, or make it writable"
        ) from None
    return [card, *(path / FILES[name] for name in drawn)]


def _draw(metadata: dict[str, Any]) -> dict[str, bytes]:
    prior = (metadata.get("settings") or {}).get("cache_prior", 0)
    drawn = {"losses": figures.losses(metadata.get("log") or [], under_prior=prior != 0)}
    if outcome := metadata.get("outcome"):
        drawn["experts"] = figures.experts(outcome)
        drawn["hit_rates"] = figures.hit_rates(outcome)
    return {name: image for name, image in drawn.items() if image is not None}


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our front matter, with what a person added to it, and the licence that they found out."""
    merged = ours | {key: value for key, value in theirs.items() if key not in ours}
    if ours["license"] == UNKNOWN and theirs.get("license"):
        merged["license"] = theirs["license"]
    return merged


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
