"""
Keep the prompts of a trace, as token ids in JSON, in a file beside it, for `melinoe predictor fit`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from melinoe.cache.trace import Trace, write_file
from melinoe.errors import DataError
from melinoe.whole_file import parse_json

FORMAT, VERSION = "melinoe-prompts", 1


def prompts_path(trace: str | Path) -> Path:
    """Return where a trace's prompts lie: ``trace.prompts.json`` beside ``trace.safetensors``."""
    # Of another ending nothing is cut off: run.1 and run.2 must not share their prompts.
    path = Path(trace)
    return path.with_name(path.name.removesuffix(".safetensors") + ".prompts.json")


def save_prompts(trace: str | Path, fingerprint: str, prompts: Sequence[Sequence[int]]) -> Path:
    """Write the prompts of the trace at path *trace* beside it, as lists of ids, or TraceError."""
    path = prompts_path(trace)
    ids = [[int(token) for token in prompt] for prompt in prompts]
    record = {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint, "prompts": ids}
    write_file(path, (json.dumps(record) + "\n").encode(), "prompts")
    return path


def load_prompts(path: str | Path, trace: Trace) -> list[list[int]]:
    """Read what `save_prompts` wrote beside the trace at *path*; DataError: none, or another's."""
    file = prompts_path(path)
    way_out = "trace them again with melinoe trace, which keeps them"
    try:
        record = parse_json(file.read_bytes())
        if record["format"] != FORMAT or record["version"] != VERSION:
            raise ValueError(f"it is no {FORMAT} of version {VERSION}")
        prompts, found = record["prompts"], record["fingerprint"]
        if not all(type(token) is int and token >= 0 for prompt in prompts for token in prompt):
            raise ValueError("it holds something else than token ids")
    except OSError as error:
        raise DataError(
            f"the prompts of {path} cannot be read from {file} ({error.strerror}); {way_out}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the prompts in {file} are malformed ({error}); {way_out}") from error
    if found != trace.fingerprint:
        raise DataError(f"the prompts in {file} belong to another model's trace; {way_out}")
    return [list(prompt) for prompt in prompts]
