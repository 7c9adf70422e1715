"""
Learn from one forward pass on the meta device what decoding reads, and what the cache keeps.

The model is run on tokens without values, its experts replaced by a function that notes how many of
them a token asks for. Keys, values and states are left in the model's own cache, whatever the
family does. The parameters that operators took are what a token reads; of a table that is only
looked up, a row.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from melinoe.moe.dispatch import bind, unbind, use_melinoe
from melinoe.moe.experts import ExpertsLayer

DIRECT = 4096
"""Tokens of the longest pass; the cache of longer texts is extrapolated."""

_LOOKUPS = (torch.nn.functional.embedding, torch.embedding, torch.index_select)
_ASKS = ("__get__", "size", "dim", "numel", "stride")


@dataclass(frozen=True)
class Pass:
    """Figures of one forward pass over some tokens of one sequence."""

    cache_bytes: tuple[int, ...]  # left in the cache, by part of it: a layer, mostly
    windows: tuple[int | None, ...]  # tokens that the part keeps at most; None: all
    read_bytes: int  # of parameters outside the experts that every token's arithmetic reads
    looked_up_bytes: int  # of tables from which a token takes a row
    top_k: tuple[int | None, ...]  # a token's experts, by MoE layer; None: it was not called


class _Reads(TorchFunctionMode):
    """Notes which parameters any function of torch takes, and which it only looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.looked_up: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        into = self.looked_up if func in _LOOKUPS else self.read
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _ASKS:  # a parameter's shape or type is no reading
            into |= {id(v) for v in (*args, *kwargs.values()) if isinstance(v, torch.nn.Parameter)}
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_experts(
    model: Any,
    layers: Sequence[ExpertsLayer],
    called: Callable[[ExpertsLayer, torch.Tensor], None] | None = None,
) -> Iterator[list[int | None]]:
    """
    Make *model*, on the meta device, run in the body; its experts return their inputs. *called* is
    told of each call of a layer's experts. Yields, by MoE layer, a token's experts. RuntimeError:
    any exception of the body's, chained.
    """
    top_k: list[int | None] = [None] * len(layers)

    def noted(layer: ExpertsLayer) -> Any:
        def experts(hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
            top_k[layer.index] = int(top_k_index.shape[-1])
            if called is not None:
                called(layer, top_k_index)
            return hidden_states

        return experts

    with contextlib.ExitStack() as stack:
        for layer in layers:
            bind(layer.module, noted(layer))
            stack.callback(unbind, layer.module)
        stack.callback(use_melinoe(model))
        logger = logging.getLogger("transformers")  # tells of missing kernels; nothing is computed
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        stack.enter_context(torch.no_grad())
        try:
            yield top_k
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def forward(
    model: Any, layers: Sequence[ExpertsLayer], tokens: int, sizes: Mapping[int, int] | None = None
) -> Pass:
    """
    Run *model*, on the meta device, over *tokens* tokens, at most `DIRECT`: well under a second.
    *sizes* are bytes of each parameter outside the experts, by ``id``. RuntimeError where the
    family's code looks at values, or keeps no cache.
    """
    reads = _Reads()
    with without_experts(model, layers) as top_k:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        with reads:
            kept = model(input_ids=ids, use_cache=True).past_key_values
    if kept is None:
        raise RuntimeError("the model left no cache")
    # The cache's layers, and whatever else it keeps as one part.
    parts = [*(getattr(kept, "layers", None) or ()), vars(kept) | {"layers": None}]
    windows = [getattr(part, "sliding_window", None) for part in parts]
    experts = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    own = {id(p): p.numel() * p.element_size() for p in model.parameters() if id(p) not in experts}
    sizes = own if sizes is None else sizes
    return Pass(
        tuple(sum(_tensors(part, {}).values()) for part in parts),
        tuple(one if isinstance(one, int) else None for one in windows),
        sum(size for key, size in sizes.items() if key in reads.read),
        sum(size for key, size in sizes.items() if key in reads.looked_up - reads.read),
        tuple(top_k),
    )


def cache_bytes(
    model: Any, layers: Sequence[ExpertsLayer], context: int, seen: Pass | None = None
) -> int:
    """
    Count the bytes that the cache holds for one sequence of *context* tokens. Beyond `DIRECT`
    tokens each part grows on as over the last half of them, up to its window. *seen* is a pass over
    ``min(context, DIRECT)`` tokens, if one was made already.
    """
    whole = seen or forward(model, layers, min(context, DIRECT))
    if context <= DIRECT:
        return sum(whole.cache_bytes)
    # Between the two lengths no window may fill up, or its growth would be taken for the whole's.
    filling = [one for one in whole.windows if one is not None and DIRECT // 2 < one < DIRECT]
    shorter = max([DIRECT // 2, *filling])
    some = forward(model, layers, shorter)
    total = 0.0
    for before, after, window in zip(
        some.cache_bytes, whole.cache_bytes, whole.windows, strict=True
    ):
        per_token = (after - before) / (DIRECT - shorter)
        still_filling = window is not None and window >= DIRECT
        end = min(context, window - 1) if window is not None and still_filling else context
        total += after + per_token * (end - DIRECT)
    return round(total)


def _tensors(value: Any, found: dict[int, int], depth: int = 0) -> dict[int, int]:
    """Collect in *found* the bytes of every tensor of two or more dimensions inside *value*."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 1:  # below that it is bookkeeping, of a few bytes
            found[id(value)] = value.numel() * value.element_size()
    elif depth < 6 and not isinstance(value, type):
        inner: Any = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
        items = value if isinstance(value, list | tuple) else [
            item for key, item in inner.items() if "config" not in str(key)
        ]  # fmt: skip
        for item in items:
            _tensors(item, found, depth + 1)
    return found
