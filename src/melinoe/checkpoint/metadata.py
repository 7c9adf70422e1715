"""
Read, check and write ``melinoe.json``: a checkpoint's origin, settings and measured locality.

The file is stamped with a version of its schema. Fields may be added within a version, and unknown
ones are left alone; a change that an older reader would misread takes the next number.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from melinoe.checkpoint.files import is_directory, locate, read_object, split_revision
from melinoe.data import Example, data_files, digest
from melinoe.errors import CheckpointError
from melinoe.schema import Schema, fields, problem
from melinoe.whole_file import write_whole

METADATA = "melinoe.json"
SCHEMA_VERSION = 1
VERSION_FIELD = "schema_version"

# How one model routed some text: experts of each sequence, and what caches of each size would do.
LOCALITY: Schema = {
    "experts_per_sequence": ["number"],
    "experts_per_sequence_mean": "estimate",
    "reuse": "estimate",
    "distinct_experts": "number",
    "caches": {
        "*": {"slots": ["count"], "hit_rate": ["estimate"], "transfers_per_token": ["estimate"]}
    },
}

# What was measured of one model, while it wrote its own completions and while it read given ones.
MEASURED: Schema = {
    "perplexity": {"*": {"in_domain": "flag", "tokens": "count", "perplexity": "estimate"}},
    **fields(LOCALITY, "writing", "reading"),
}

# The fine-tuned model against another, paired by example; "ratio" is the other model's over the
# fine-tuned one's: how many times fewer.
_LOCALITY_CHANGE: Schema = {
    "experts_per_sequence": "estimate",
    "transfers_per_token": {"*": {"slots": ["count"], "ratio": ["estimate"]}},
}
CHANGE: Schema = {"perplexity": {"*": "estimate"}, **fields(_LOCALITY_CHANGE, "writing", "reading")}

# What fine-tuning bought and cost: both models on the same held-out examples; and the control, the
# same run without locality terms, where there was one: it tells apart what these terms did.
OUTCOME: Schema = {
    **fields("count", "examples", "prompts", "max_new_tokens", "slots", "num_experts", "top_k",
              "layers"),
    **fields(MEASURED, "before", "after", "control?"),
    **fields(CHANGE, "change", "change_from_control?"),
    "control_run?": {"name": "text", "fingerprint?": "text", "settings?": "object"},
    "machine?": "object",
    "date?": "text",
    "seconds?": "number",
}  # fmt: skip

FIELDS: Schema = {
    # The commit is of the hub's repository, at the time of the run; null for a directory.
    **fields("text", "base?", "base_model?", "base_commit?", "base_fingerprint?", "fingerprint?",
              "license?", "compute_dtype?"),
    **fields("object", "settings?", "versions?"),
    # Whether the run had no locality terms, so that it is a control of one that had.
    "is_control?": "flag",
    # The peak rates that the run took; the settings may leave them to the model's width.
    "learning_rates?": {"width": "count", **fields("number", "routers", "low_rank")},
    # The text that it replayed.
    "anchor?": {"examples": "count", "tokens_sha256": "text"},
    "data?": {
        # The columns' own names; the last sum is of the token ids, and which are completion.
        **fields("text", "source?", "split?", "columns?", "sha256?", "tokens_sha256?"),
        # What could not be learned, what was cut at the greatest length, what was not trained on.
        **fields("count", "examples?", "left_out?", "shortened?", "tokens_cut?",
                  "turns_unlearned?", "held_out?"),
    },
    "log?": [{"step?": "count"}],
    "skipped_steps?": "count",
    "seconds?": "number",
    # Every other file that was written with this one, but the card.
    "files?": {"*": {"bytes": "count", "sha256": "text"}},
    "outcome?": OUTCOME,
}  # fmt: skip


def read_metadata(name: str | Path) -> dict[str, Any]:
    """
    Read and check a checkpoint's ``melinoe.json``; empty where it has none. Its ``schema_version``
    is checked and left out; a file without one is of the first version. Fields that this release
    does not know are kept. CheckpointError: malformed, or of a newer release.
    """
    path = locate(str(name), METADATA)
    if path is None:
        return {}
    again = "delete it, or write the checkpoint again"
    found = read_object(path, again)
    version = found.pop(VERSION_FIELD, 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{path} has the {VERSION_FIELD} {version!r}, which is no version; {again}"
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has {VERSION_FIELD} {version} and this release reads up to {SCHEMA_VERSION}; "
            "update melinoe"
        )
    if wrong := problem(found, FIELDS):
        raise CheckpointError(f"{path} is malformed: {wrong}; {again}")
    return found


def update_metadata(directory: str | Path, **more: Any) -> dict[str, Any]:
    """Set fields of a checkpoint's ``melinoe.json``, and return all; ValueError for a wrong one."""
    metadata = {**read_metadata(directory), **more}
    if wrong := problem(metadata, FIELDS):
        raise ValueError(f"melinoe.json cannot hold this: {wrong}")
    write_metadata(directory, metadata)
    return metadata


def write_metadata(directory: str | Path, metadata: dict[str, Any]) -> None:
    """Write ``melinoe.json``, stamped, into a directory; a reader sees the old or the new."""
    stamped = {VERSION_FIELD: SCHEMA_VERSION, **metadata}
    text = json.dumps(stamped, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(Path(directory) / METADATA, text)


# --- where a fine-tuned model comes from ----------------------------------------------------------

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def describe_base(name: str | Path) -> dict[str, Any]:
    """
    Say what a base model is called and under which terms, as ``melinoe.json`` holds it. ``base`` is
    the hub name, or the directory's own name, for a path is nobody else's business; ``base_model``
    the hub name; ``license`` and ``language`` what the base's card says.
    """
    local = is_directory(str(name))
    card = read_card(name)
    license, language = card.get("license"), card.get("language")
    return {
        "base": Path(name).expanduser().resolve().name if local else str(name),
        # A revision behind an @ is ours alone; the hub's cards name repositories.
        "base_model": None if local else split_revision(str(name))[0],
        "license": license if isinstance(license, str) else None,
        "language": language if isinstance(language, str | list) else None,
    }


def read_card(name: str | Path) -> dict[str, Any]:
    """Read the front matter of a checkpoint's README.md; empty where there is none."""
    # Imported here: it loads YAML, and only cards need it.
    from huggingface_hub import metadata_load

    try:
        path = locate(str(name), "README.md")
        found = metadata_load(path) if path is not None else None
    except Exception:  # offline without a card; a card is free text, and need not hold YAML
        return {}
    return found if isinstance(found, dict) else {}


def describe_data(
    source: str | Path | None, examples: Sequence[Example], split: str | None = None
) -> dict[str, Any]:
    """
    Say what a model was trained on, so that somebody else can tell whether they have the same.
    ``sha256`` is of the file's bytes, of a directory's files one after the other, or, from the hub,
    of the examples as JSON lines; ``sha256_of`` says which.
    """
    found: dict[str, Any] = {
        "source": source and str(source),
        "hub": bool(source is not None and _HUB_NAME.match(str(source))),
        "split": None if source is None else split,
        "examples": len(examples),
    }
    path = None if source is None else Path(source)
    if path is None or not path.exists():
        return found | {"sha256": digest(examples), "sha256_of": "examples"}
    files = hashlib.sha256()
    for file in data_files(path):
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                files.update(block)
    found |= {"source": path.resolve().name, "hub": False, "split": None}
    of = "files" if path.is_dir() else "file"
    return found | {"sha256": files.hexdigest(), "sha256_of": of}
