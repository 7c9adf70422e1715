"""
Read, check and write ``melinoe.json``: a checkpoint's origin, settings and measured locality.

The file is stamped with a version of its schema. Fields may be added within a version, and unknown
ones are left alone; a change that an older reader would misread takes the next number.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melinoe.checkpoint.files import read_object
from melinoe.checkpoint.hub import locate
from melinoe.data import Example, data_files, digest
from melinoe.errors import CheckpointError
from melinoe.whole_file import write_whole

METADATA = "melinoe.json"
SCHEMA_VERSION = 1
VERSION_FIELD = "schema_version"

# A schema is the name of a type; a list of one schema, for a list of any length; a dict, for an
# object: a key that ends in "?" may be absent or null, and "*" stands for any key.
Schema = str | list[Any] | dict[str, Any]

ESTIMATE: Schema = {"mean": "number", "low": "number", "high": "number", "n": "count"}

# How one model routed some text: experts of each sequence, and what caches of each size would do.
LOCALITY: Schema = {
    "experts_per_sequence": ["number"],
    "experts_per_sequence_mean": ESTIMATE,
    "reuse": ESTIMATE,
    "distinct_experts": "number",
    "caches": {
        "*": {"slots": ["count"], "hit_rate": [ESTIMATE], "transfers_per_token": [ESTIMATE]},
    },
}

# What was measured of one model, while it wrote its own completions and while it read given ones.
MEASURED: Schema = {
    "perplexity": {
        "*": {"in_domain": "flag", "tokens": "count", "perplexity": ESTIMATE},
    },
    "writing": LOCALITY,
    "reading": LOCALITY,
}

LOCALITY_CHANGE: Schema = {
    "experts_per_sequence": ESTIMATE,
    # The other model's over the fine-tuned one's: how many times fewer.
    "transfers_per_token": {"*": {"slots": ["count"], "ratio": [ESTIMATE]}},
}

# The fine-tuned model against another, paired by example.
CHANGE: Schema = {
    "perplexity": {"*": ESTIMATE},
    "writing": LOCALITY_CHANGE,
    "reading": LOCALITY_CHANGE,
}

# What fine-tuning bought and cost: both models on the same held-out examples; and the control, the
# same run without locality terms, where there was one: it tells apart what these terms did.
OUTCOME: Schema = {
    "examples": "count",
    "prompts": "count",
    "max_new_tokens": "count",
    "slots": "count",
    "num_experts": "count",
    "top_k": "count",
    "layers": "count",
    "before": MEASURED,
    "after": MEASURED,
    "change": CHANGE,
    "control?": MEASURED,
    "change_from_control?": CHANGE,
    "control_run?": {"name": "text", "fingerprint?": "text", "settings?": "object"},
    "machine?": "object",
    "date?": "text",
    "seconds?": "number",
}

FIELDS: Schema = {
    "base?": "text",
    "base_model?": "text",
    # Of the hub's repository, at the time of the run; null for a directory.
    "base_commit?": "text",
    "base_fingerprint?": "text",
    "fingerprint?": "text",
    "license?": "text",
    "settings?": "object",
    # Whether the run had no locality terms, so that it is a control of one that had.
    "is_control?": "flag",
    # The peak rates that the run took; the settings may leave them to the model's width.
    "compute_dtype?": "text",
    "learning_rates?": {"width": "count", "routers": "number", "low_rank": "number"},
    # The earlier run that this one learned from beside its data.
    "teacher?": {"source": "text", "fingerprint": "text"},
    # The text that was replayed beside its data.
    "anchor?": {"examples": "count", "tokens_sha256": "text"},
    "data?": {
        "source?": "text",
        "split?": "text",
        # What the data's columns are, where they have names of their own.
        "columns?": "text",
        "examples?": "count",
        # Examples and turns that could not be learned, and what was cut at the greatest length.
        "left_out?": "count",
        "shortened?": "count",
        "tokens_cut?": "count",
        "turns_unlearned?": "count",
        # Kept from training.
        "held_out?": "count",
        "sha256?": "text",
        # Of the token ids that were trained on, and which of them are completion.
        "tokens_sha256?": "text",
    },
    "log?": [{"step?": "count"}],
    "skipped_steps?": "count",
    "seconds?": "number",
    "versions?": "object",
    # Every other file that was written with this one, but the card.
    "files?": {"*": {"bytes": "count", "sha256": "text"}},
    "outcome?": OUTCOME,
}


def read_metadata(name: str | Path) -> dict[str, Any]:
    """
    Read and check a checkpoint's ``melinoe.json``; empty where it has none.

    The file's own ``schema_version`` is checked and left out; a file without one is read as the
    first version. Fields that this release does not know are kept as they are.

    Args:
        name: A directory, or the name of a repository on the hub.

    Raises:
        CheckpointError: not a JSON object, a field that is not what it should be, or a file that
            a newer release wrote.
    """
    path = locate(str(name), METADATA)
    if path is None:
        return {}
    found = read_object(path, "delete it, or write the checkpoint again")
    version = found.pop(VERSION_FIELD, 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{path} has the {VERSION_FIELD} {version!r}, which is no version; delete the file, or "
            "write the checkpoint again"
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has {VERSION_FIELD} {version} and this release reads up to {SCHEMA_VERSION}; "
            "update melinoe"
        )
    if problem := check_metadata(found):
        raise CheckpointError(
            f"{path} is malformed: {problem}; delete it, or write the checkpoint again"
        )
    return found


def update_metadata(directory: str | Path, **fields: Any) -> dict[str, Any]:
    """
    Set *fields* of a checkpoint's ``melinoe.json``, and return all of it.

    Raises:
        CheckpointError: as `read_metadata`.
        ValueError: a field that is not what it should be; nothing is written.
    """
    metadata = {**read_metadata(directory), **fields}
    if problem := check_metadata(metadata):
        raise ValueError(f"melinoe.json cannot hold this: {problem}")
    write_metadata(directory, metadata)
    return metadata


def write_metadata(directory: str | Path, metadata: dict[str, Any]) -> None:
    """
    Write ``melinoe.json`` into an existing directory, stamped; a reader sees the old or the new.

    ValueError where JSON cannot hold *metadata*, as NaN.
    """
    stamped = {VERSION_FIELD: SCHEMA_VERSION, **metadata}
    text = json.dumps(stamped, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(Path(directory) / METADATA, text)


def check_metadata(found: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the contents of a ``melinoe.json``; ``None`` if nothing is."""
    return _problem(found, FIELDS, "")


def _problem(value: Any, schema: Schema, where: str) -> str | None:
    if isinstance(schema, str):
        words, holds = _TYPES[schema]
        return None if holds(value) else f"{where} is not {words}"
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        items = ((f"{where}[{i}]", item, schema[0]) for i, item in enumerate(value))
        return next((p for at, item, one in items if (p := _problem(item, one, at))), None)
    if not isinstance(value, Mapping):
        return f"{where or 'it'} is not an object"
    for key, inner in schema.items():
        if key == "*":
            fields = {name: (item, inner) for name, item in value.items()}
        else:
            name, optional = key.removesuffix("?"), key.endswith("?")
            if value.get(name) is None:
                if optional:
                    continue
                return f"{where or 'it'} has no {name!r}"
            fields = {name: (value[name], inner)}
        for name, (item, one) in fields.items():
            if problem := _problem(item, one, f"{where}.{name}" if where else name):
                return problem
    return None


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


_TYPES = {
    "text": ("a text", lambda v: isinstance(v, str)),
    "flag": ("true or false", lambda v: isinstance(v, bool)),
    "number": ("a finite number", _is_number),
    "count": (
        "a whole number of 0 or more",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
    ),
    "object": ("an object", lambda v: isinstance(v, Mapping)),
}


# --- where a fine-tuned model comes from ----------------------------------------------------------

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def describe_base(name: str | Path) -> dict[str, Any]:
    """
    Say what a base model is called and under which terms, as ``melinoe.json`` holds it.

    Returns:
        ``base``: the hub name, or the directory's own name, for a path is nobody else's business;
        ``base_model``: the hub name, else ``None``; ``license`` and ``language``: what the base's
        card says, else ``None``.
    """
    is_directory = Path(name).expanduser().is_dir()
    card = read_card(name)
    license, language = card.get("license"), card.get("language")
    return {
        "base": Path(name).expanduser().resolve().name if is_directory else str(name),
        # A revision behind an @ is ours alone; the hub's cards name repositories.
        "base_model": None if is_directory else str(name).partition("@")[0],
        "license": license if isinstance(license, str) else None,
        "language": language if isinstance(language, str | list) else None,
    }


def read_card(name: str | Path) -> dict[str, Any]:
    """Read the front matter of a checkpoint's README.md; empty where there is none."""
    try:
        path = locate(str(name), "README.md")
    except CheckpointError:  # offline, and the cache holds no card: it says nothing
        path = None
    if path is None:
        return {}
    # Imported here: it loads YAML, and only cards need it.
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(path)
    except Exception:  # a card is free text: what is not YAML says nothing
        return {}
    return found if isinstance(found, dict) else {}


def describe_data(
    source: str | Path | None, examples: Sequence[Example], split: str | None = None
) -> dict[str, Any]:
    """
    Say what a model was trained on, so that somebody else can tell whether they have the same.

    Returns:
        ``source``: the hub name, or the name of the file or directory; ``hub``: whether it is on
        the hub; ``split``, ``examples``; ``sha256``: of the file's bytes, of a directory's files
        one after the other, or, from the hub, of the examples as JSON lines; ``sha256_of``:
        which of these.
    """
    path = None if source is None else Path(source)
    local = path is not None and path.exists()
    files = hashlib.sha256()
    if path is not None and local:
        for file in data_files(path):
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    files.update(block)
    return {
        "source": path.resolve().name if path is not None and local else source and str(source),
        "hub": bool(path is not None and not local and _HUB_NAME.match(str(source))),
        "split": None if local or source is None else split,
        "examples": len(examples),
        "sha256": files.hexdigest() if local else digest(examples),
        "sha256_of": ("files" if path is not None and path.is_dir() else "file")
        if local
        else "examples",
    }
