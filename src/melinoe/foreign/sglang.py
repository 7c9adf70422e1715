"""
SGLang's expert distribution recorder: the ``.pt`` files that ``/dump_expert_distribution_record``
writes, as `python/sglang/srt/eplb/expert_distribution.py` of SGLang 0.5 has them.

They are torch files. They are read with ``weights_only=True``, so that nothing in them is run.

- ``--expert-distribution-recorder-mode per_token``: a dict with ``records``, one per forward pass,
  each with ``topk_ids_of_layer`` (layers, tokens, 8), ``extend_seq_lens`` (a list in passes that
  read prompts), ``positions``; and ``last_physical_to_logical_map``. That is a trace, if one
  request ran at a time (``--max-running-requests 1``): the recorder does not say whose tokens are
  whose.
- ``stat`` and ``stat_approx``: ``logical_count`` (steps, layers, experts); ``per_pass``: records
  with ``global_physical_count``. Counts without the experts of each token: statistics, no trace.

Layers without experts are recorded as empty; they are left out, and the others numbered from 0.
"""

import os
from typing import Any

import numpy as np

from melinoe.cache.trace import Trace, TraceBuilder
from melinoe.errors import TraceError


def read_sglang(
    path: str | os.PathLike, num_experts: int | None = None, model: str = ""
) -> Trace | np.ndarray:
    """
    Read one recorder file.

    Args:
        path: The file; of several ranks, rank 0's.
        num_experts: Experts of each layer; absent, as many as the file's map names.
        model: For people.

    Returns:
        A trace where the order is recorded, else counts, float64 (layers, num_experts).

    Raises:
        TraceError: another file, or several requests at a time.
    """
    content = _load(path)
    try:
        if "logical_count" in content:
            return _with_experts(_array(content["logical_count"]).sum(axis=0))
        records = content["records"]
        physical = _array(content["last_physical_to_logical_map"])
        experts = int(physical.max()) + 1 if num_experts is None else num_experts
        if records and "topk_ids_of_layer" not in records[0]:
            return _counts(records, physical, experts)
        return _trace(path, records, physical, experts, model)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TraceError(
            f"{path} is not what SGLang's recorder writes ({type(error).__name__}: {error}); "
            "record it with SGLang 0.5"
        ) from error


def _load(path: str | os.PathLike) -> dict[str, Any]:
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise TraceError(
            f"{path} is torn, or holds more than numbers, which is not read; dump it again"
        ) from error
    if not isinstance(content, dict) or not {"records", "logical_count"} & content.keys():
        raise TraceError(f"{path} is no file of SGLang's expert distribution recorder; name one")
    return content


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.cpu() if hasattr(value, "cpu") else value)


def _with_experts(counts: np.ndarray) -> np.ndarray:
    """Layers that counted anything."""
    return counts[counts.sum(axis=1) > 0].astype(np.float64)


def _counts(records: list[dict[str, Any]], physical: np.ndarray, experts: int) -> np.ndarray:
    counts = [_array(record["global_physical_count"]).astype(np.float64) for record in records]
    total = np.sum(counts, axis=0)
    logical = np.zeros((len(total), experts))
    for layer, row in enumerate(total):
        np.add.at(logical[layer], physical[layer], row)
    return _with_experts(logical)


def _trace(
    path: str | os.PathLike,
    records: list[dict[str, Any]],
    physical: np.ndarray,
    experts: int,
    model: str,
) -> Trace:
    passes = []
    for record in records:
        ids = _array(record["topk_ids_of_layer"]).astype(np.int64).transpose(1, 0, 2)
        layer = np.arange(ids.shape[1])[None, :, None]
        passes.append(np.where(ids < 0, -1, physical[layer, np.maximum(ids, 0)]))
    everything = np.concatenate(passes)
    used = everything >= 0
    layers, top_k = used.any(axis=(0, 2)), int(used.any(axis=(0, 1)).sum())
    builder = TraceBuilder(int(layers.sum()), experts, top_k)
    sequence, position, was_prompt = -1, -1, False
    for record, chosen in zip(records, passes, strict=True):
        lengths = record["extend_seq_lens"]
        prompt = bool(lengths)
        if not len(chosen):
            continue
        if (len(lengths) if prompt else len(chosen)) > 1:
            raise TraceError(
                f"{path} has passes of several requests, and does not say whose tokens are whose; "
                "record it with --max-running-requests 1, or import its counts with --statistics"
            )
        positions = _array(record["positions"])
        # A prompt that goes on where the last pass ended is the same one, read in chunks.
        if prompt and not (was_prompt and int(positions[0]) == position + 1):
            sequence += 1
        elif sequence < 0:
            raise TraceError(
                f"{path} begins in the middle of an answer; start the recorder before the request"
            )
        was_prompt, position = prompt, int(positions[-1])
        builder.add_forward(chosen[:, layers][:, :, :top_k], sequence, 0 if prompt else 1)
    return builder.trace(model, note="imported from SGLang's expert distribution recorder")
