"""Bytes that a prompt's pass needs while it runs, told by one without values that is watched."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from melinoe.engine.device.cache_bytes import static_cache, untold
from melinoe.engine.device.cache_state import tensors
from melinoe.moe import meta_pass
from melinoe.moe.experts import ExpertsLayer


def workspace_bytes(model: Any, layers: Sequence[ExpertsLayer], batch: int, context: int) -> int:
    """
    The most that is alive at once in a prompt's pass, beside weights and cache.

    What each of the family's operations makes is followed from its making to its end; so attention
    that keeps all probabilities is counted with them, and fused attention without. The experts'
    part is ours and is added where they are called.

    Args:
        model: on the meta device.
        layers: its MoE layers.
        batch: sequences at once.
        context: tokens of each.

    Raises:
        BudgetError: the family's code looks at values.
    """
    most = 0

    def called(layer: ExpertsLayer, top_k_index: Tensor) -> None:
        nonlocal most
        most = max(most, live.bytes + experts_bytes(layer, *top_k_index.shape))

    options: dict[str, Any] = {"use_cache": True}
    if getattr(model, "_supports_logits_to_keep", bool)():
        options["logits_to_keep"] = 1  # as generate does
    try:
        try:
            cache = static_cache(model, layers, batch, context)
        except RuntimeError:
            known: Iterable[Tensor] = ()
        else:
            options["past_key_values"] = cache
            known = [one for layer in cache.layers for one in tensors(layer)]
        ids = torch.zeros(batch, context, dtype=torch.long, device="meta")
        held = (ids, *model.parameters(), *model.buffers(), *known)
        with meta_pass.without_experts(model, layers, called), watched(held) as live:
            model(input_ids=ids, **options)
    except RuntimeError as error:
        raise untold(model, "a prompt", error) from error
    return max(most, live.most)


def experts_bytes(layer: ExpertsLayer, tokens: int, top_k: int) -> int:
    """What computing the experts of so many tokens takes if all are resident: all pairs at once."""
    down = next(tensor for tensor in layer.tensors if tensor.name == "down_proj")
    larger, smaller = max(down.shape), min(down.shape)  # of hidden and intermediate size
    # Gathered inputs, both projections, the gated product, outputs and their weighted sum.
    pairs = tokens * top_k * (5 * larger + 4 * smaller) * down.dtype.itemsize
    indices = 8 * tokens * top_k * 8
    return pairs + indices


class Live(TorchDispatchMode):
    """
    Follows memory: what operations make, until nobody holds it any more.

    Attributes:
        bytes: alive now.
        most: alive at once, at most.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known = weakref.WeakSet(one.untyped_storage() for one in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.untyped_storage() not in self._known:
                storage = one.untyped_storage()
                self._known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return made

    def _gone(self, nbytes: int) -> None:
        self.bytes -= nbytes


class _FusedAttention(TorchFunctionMode):
    """Attention by one kernel, as on a GPU: its output, and its mask as numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, _, value = args[:3]
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        numbers = None if mask is None else torch.empty_like(mask, dtype=query.dtype)
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        del numbers
        return output


@contextmanager
def watched(known: Iterable[Tensor]) -> Iterator[Live]:
    """In the body memory is followed, but not that of *known*; attention is fused."""
    live = Live(known)
    with _FusedAttention(), live:
        yield live
