"""Arrays of choices: ``.npy``, or ``.npz`` with what else a trace holds beside them."""

import os
import zipfile
from pathlib import Path

import numpy as np

from melinoe.cache.trace import Trace
from melinoe.errors import TraceError
from melinoe.foreign.columns import whole
from melinoe.foreign.rows import Rows, counts_of, trace_of

_CHOICES = ("experts", "topk_ids", "expert_ids", "selected_experts")
_LAST = {"sequence": np.iinfo(np.int32).max, "kind": 2, "forward": np.iinfo(np.int32).max}


def read_arrays(
    path: str | os.PathLike, num_experts: int | None, model: str, statistics: bool
) -> tuple[Trace | np.ndarray, list[str]]:
    """
    Read a trace, or statistics if no more is wanted.

    Args:
        path: Its array ``experts`` (or its only one) holds integers (tokens, layers, k), -1 for no
            expert; an ``.npz`` may also hold ``sequence``, ``kind`` and ``forward``, one integer a
            token, and ``scores``, shaped as the experts.
        num_experts: Experts of each layer; the arrays do not say how many were never chosen.
        model: For people.
        statistics: Counts are enough.

    Returns:
        The trace, or counts, float64 (layers, num_experts); and what was assumed or left out.

    Raises:
        TraceError: it cannot be read, holds objects, which are pickles, or is of another form.
    """
    notes: list[str] = []
    try:
        with Path(path).open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"experts": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        name = next((n for n in _CHOICES if n in arrays), None)
        if name is None and len(arrays) == 1:
            name = next(iter(arrays))
        if name is None:
            raise ValueError(f"none of its arrays {', '.join(arrays)} is called experts")
        experts = arrays.pop(name)
        if experts.ndim != 3 or not experts.size:
            raise ValueError(f"{name} has the shape {experts.shape}, not (tokens, layers, k)")
        if num_experts is None:
            raise ValueError("it does not say how many experts a layer has; give --num-experts")
        tokens, layers, top_k = experts.shape
        token = np.repeat(np.arange(tokens), layers)
        number = token + 1
        flat = whole("expert", experts.ravel(), -1, num_experts - 1, rows=np.repeat(number, top_k))
        rows: Rows = {"number": number, "token": token, "experts": flat.reshape(-1, top_k)}
        rows["layer"] = np.tile(np.arange(layers), tokens)
        for name in _LAST.keys() & arrays.keys():
            values = arrays.pop(name)
            if values.shape != (tokens,):
                raise ValueError(f"{name} has the shape {values.shape}, not ({tokens},)")
            rows[name] = np.repeat(whole(name, values, 0, _LAST[name]), layers)
        if (scores := arrays.pop("scores", None)) is not None:
            if scores.shape != experts.shape or scores.dtype.kind != "f":
                raise ValueError("scores are no floats of the shape of its experts")
            rows["scores"] = scores.reshape(-1, top_k).astype(np.float16)
        if arrays:
            notes.append(f"arrays left out: {', '.join(arrays)}")
        if statistics:
            return counts_of(rows, num_experts, notes), notes
        return trace_of(rows, num_experts, model, f"imported from {Path(path).name}", notes), notes
    except (ValueError, TraceError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(
            f"the arrays {path} cannot be imported: {error}; docs/traces.md has the form"
        ) from error
