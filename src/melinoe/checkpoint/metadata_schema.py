"""
What ``melinoe.json`` holds, field by field, and what is wrong with one that does not.

A file is stamped with a version. Fields may be added within a version, and unknown ones are left
alone; a change that an older reader would misread takes the next number.
"""

import math
from collections.abc import Mapping
from typing import Any

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

# Of a search for the strongest run within a price: what was asked for, and what was paid on texts
# that chose nothing, as shares of the control's perplexity.
PRICE: Schema = {
    "bounds?": {"*": "number"},
    "paid?": {"*": ESTIMATE},
    "met?": "flag",
    "met_by_the_whole_interval?": "flag",
    # By other model (reference, base) and policy.
    "times_fewer_than?": {"*": {"*": ESTIMATE}},
}

METADATA: Schema = {
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
        # Kept from training; and how many of them a search for a price chose by.
        "held_out?": "count",
        "chosen_by?": "count",
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
    "price?": PRICE,
    "outcome?": OUTCOME,
}


def check_metadata(found: Mapping[str, Any]) -> str | None:
    """Say what is wrong with the contents of a ``melinoe.json``; ``None`` if nothing is."""
    return _problem(found, METADATA, "")


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
