"""
Read the files of SGLang's expert distribution recorder, as SGLang 0.4.7 to 0.5.23 writes them.

They are torch files, which are pickles, and are read with ``weights_only=True``: torch's unpickler
then builds numbers, texts, lists, dicts and tensors, and runs nothing.

- Mode per_token: ``records``, one per forward pass, each with ``topk_ids_of_layer`` (layers,
  tokens, 8), ``extend_seq_lens`` (a list in passes that read prompts), ``positions``,
  ``forward_mode``; and ``last_physical_to_logical_map``. That is a trace, if one request ran at a
  time: the recorder does not say whose tokens are whose.
- Modes stat and stat_approx: ``logical_count`` (steps, layers, experts); per_pass: records with
  ``global_physical_count``. Counts without the experts of each token: statistics, no trace.

Layers without experts are recorded as empty; they are left out, and the others numbered from 0.
"""

import os
from typing import Any

import numpy as np

from melinoe.cache.trace import Trace, TraceBuilder
from melinoe.errors import TraceError
from melinoe.foreign.tables import whole

_INT64 = np.iinfo(np.int64)
# `ForwardMode` of SGLang: a prompt, one token of each answer, nothing.
_PLAIN_PASSES = {1, 2, 4}


def read_sglang(path: str | os.PathLike, model: str, statistics: bool) -> Trace | np.ndarray:
    """
    Read one recorder file; of several ranks, rank 0's.

    Returns:
        A trace if the order is recorded and no *statistics* are asked for, else counts, float64
        (layers, num_experts).

    Raises:
        TraceError: another file, one without a pass, or passes whose tokens belong to nobody knows
            whom.
    """
    content = _load(path)
    try:
        if "logical_count" in content:
            return _used(path, _array(content["logical_count"]).sum(axis=0))
        records = content["records"]
        if not records:
            raise TraceError(
                f"{path} holds no forward pass; send requests between "
                "/start_expert_distribution_record and /dump_expert_distribution_record"
            )
        physical = _array(content["last_physical_to_logical_map"])
        experts = int(physical.max()) + 1
        if "topk_ids_of_layer" not in records[0]:
            total = sum(_array(record["global_physical_count"]) for record in records)
            # Physical experts are added up by the logical ones that they are copies of.
            layers = zip(physical, np.asarray(total), strict=True)
            return _used(path, np.stack([np.bincount(at, row, experts) for at, row in layers]))
        chosen = [_logical(path, record, physical) for record in records]
        if not statistics:
            return _trace(path, records, chosen, experts, model)
        rows = np.concatenate(chosen).transpose(1, 0, 2)
        return _used(
            path, np.stack([np.bincount(ids[ids >= 0], minlength=experts) for ids in rows])
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TraceError(
            f"{path} is not what SGLang's recorder writes ({type(error).__name__}: {error}); "
            "record it with SGLang 0.5"
        ) from error


def _load(path: str | os.PathLike) -> dict[str, Any]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}; check the path") from error
    except Exception as error:  # a broken pickle raises whatever its bytes lead to
        raise TraceError(
            f"{path} is torn, or holds more than numbers, which is not read; dump it again"
        ) from error
    if not isinstance(content, dict) or not {"records", "logical_count"} & content.keys():
        raise TraceError(f"{path} is no file of SGLang's expert distribution recorder; name one")
    return content


def _array(value: Any) -> np.ndarray:
    """Read whole numbers, which are all that the recorder writes; -1 is no expert."""
    array = np.asarray(value.cpu() if hasattr(value, "cpu") else value)
    return whole("number", array.ravel(), -1, _INT64.max).reshape(array.shape)


def _used(path: str | os.PathLike, counts: np.ndarray) -> np.ndarray:
    """Keep the layers that counted anything."""
    found = counts[counts.sum(axis=1) > 0].astype(np.float64)
    if not len(found):
        raise TraceError(f"{path} counts no choice; send requests while it records")
    return found


def _logical(path: str | os.PathLike, record: dict[str, Any], physical: np.ndarray) -> np.ndarray:
    """Logical experts of a pass, (tokens, layers, 8); -1 for none."""
    ids = _array(record["topk_ids_of_layer"]).transpose(1, 0, 2)
    if ids.size and ids.max() >= physical.shape[1]:
        raise TraceError(
            f"{path} names expert {ids.max()} of {physical.shape[1]}, as SGLang does when it "
            "counts shared experts among the chosen ones; record it with "
            "--disable-shared-experts-fusion"
        )
    layer = np.arange(ids.shape[1])[None, :, None]
    return np.where(ids < 0, -1, physical[layer, np.maximum(ids, 0)])


def _trace(
    path: str | os.PathLike,
    records: list[dict[str, Any]],
    passes: list[np.ndarray],
    experts: int,
    model: str,
) -> Trace:
    used = np.concatenate(passes) >= 0
    layers, top_k = used.any(axis=(0, 2)), int(used.any(axis=(0, 1)).sum())
    builder = TraceBuilder(int(layers.sum()), experts, top_k)
    sequence, position, was_prompt = -1, -1, False
    for record, chosen in zip(records, passes, strict=True):
        lengths = record["extend_seq_lens"]
        prompt = bool(lengths)
        if not len(chosen):
            continue
        if record.get("forward_mode", 1) not in _PLAIN_PASSES:
            raise TraceError(
                f"{path} has passes that guess tokens or mix prompts with answers (forward mode "
                f"{record['forward_mode']}); record it without speculative decoding and "
                "--enable-mixed-chunk, or import its counts with --statistics"
            )
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
