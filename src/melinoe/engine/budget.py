"""
Memory and slots: how many experts fit into an amount, never one more.

A budget of GPU memory is a contract: everything is counted, and what is left goes to slots. What is
counted beside the slots: the backbone's weights as they lie in memory; the cache of *batch*
sequences of *context* tokens; the staging blocks; what the largest forward pass, a prompt of
*context* tokens in every sequence, needs while it runs; and the buffers of captured steps. The
cache and the pass are asked of the model itself, on the meta device. PyTorch's allocator gives
large tensors whole pieces of 2 MiB, and so does this arithmetic. The CUDA context, some hundred
MiB that no allocator sees, is not counted.
"""

from __future__ import annotations

import math
import re
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from melinoe.engine.device.staging import staging_bytes
from melinoe.engine.device.static_cache import tensors
from melinoe.errors import BudgetError, UnknownNeedError
from melinoe.host_memory import format_bytes
from melinoe.moe import meta_pass
from melinoe.moe.experts import ExpertsLayer

# cuBLAS keeps 32 MiB on Hopper for each stream that computes; one computes, one captures.
_LIBRARIES = 64 << 20
_GRAPHS = 64 << 20
# PyTorch's allocator packs small tensors together, and gives large ones whole pieces.
_SMALL, _PIECE = 1 << 20, 2 << 20


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """
    Read an amount of memory: ``"8GiB"``, ``"500 MB"``, ``"1.5gib"``, ``"1024"`` or an int.

    Returns:
        Bytes, rounded down.

    Raises:
        BudgetError: no number, an unknown unit, or nothing left after rounding.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        amount = text
    else:
        match = _BYTES.fullmatch(str(text))
        if match is None or match[2].lower() not in _UNITS:
            raise BudgetError(
                f"{text!r} is not an amount of memory; write it like 8GiB, 500MB or 1073741824"
            )
        amount = _exact(match[1], _UNITS[match[2].lower()])
    if amount <= 0:
        raise BudgetError(f"{text!r} leaves no memory; write an amount like 8GiB or 500MB")
    return amount


def _exact(number: str, unit: int) -> int:
    """``number * unit`` in whole numbers: a float would lose the last bytes of a large budget."""
    whole, _, part = number.partition(".")
    return int(whole or 0) * unit + (int(part) * unit // 10 ** len(part) if part else 0)


def memory_of(slots: int | Sequence[int], layers: Sequence[ExpertsLayer]) -> int:
    """Bytes of *slots* per layer, or of each layer; none gets more slots than it has experts."""
    counts = [slots] * len(layers) if isinstance(slots, int) else slots
    each = zip(counts, layers, strict=True)
    return sum(min(count, layer.num_experts) * layer.block_bytes for count, layer in each)


def slots_for(expert_memory: str | int, layers: Sequence[ExpertsLayer]) -> int:
    """
    The most slots per layer, alike in all layers, whose bytes stay within *expert_memory*.

    Returns:
        Between 1 and the largest number of experts of a layer.

    Raises:
        BudgetError: not even one slot per layer fits; the message has the smallest that works.
    """
    budget = parse_bytes(expert_memory)
    smallest = memory_of(1, layers)
    if budget < smallest:
        raise BudgetError(
            f"an expert memory of {format_bytes(budget)} is below one expert in each of "
            f"{len(layers)} layers; give at least {smallest} bytes ({format_bytes(smallest)})"
        )
    possible = range(1, max(layer.num_experts for layer in layers) + 1)
    return bisect_right(possible, budget, key=lambda slots: memory_of(slots, layers))


def slots_by_layer(slots: int | Sequence[int], layers: Sequence[ExpertsLayer]) -> tuple[int, ...]:
    """
    Slots of each layer; one number for all of them is cut to the experts that a layer has.

    Raises:
        BudgetError: no slot or more than experts, or not one number for each layer.
    """
    if isinstance(slots, int):
        most = max(layer.num_experts for layer in layers)
        if not 1 <= slots <= most:
            raise BudgetError(
                f"{slots} slots per layer do not work with {most} experts; "
                f"give between 1 and {most}"
            )
        return tuple(min(slots, layer.num_experts) for layer in layers)
    if len(slots) != len(layers):
        raise BudgetError(
            f"slots are given for {len(slots)} layers of {len(layers)}; give one number for each, "
            "or one for all"
        )
    for number, (count, layer) in enumerate(zip(slots, layers, strict=True)):
        if not 1 <= count <= layer.num_experts:
            raise BudgetError(
                f"{count} slots do not work in layer {number} with {layer.num_experts} experts; "
                f"give between 1 and {layer.num_experts}"
            )
    return tuple(map(int, slots))


# --- a GPU ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuBudget:
    """
    Where the memory of a budget goes, in bytes; the parts add up to *total* or less.

    Attributes:
        total: the budget.
        backbone: all weights and buffers but the experts'.
        kv_cache: keys and values, and recurrent states.
        staging: the two blocks that prompts' experts pass through.
        workspace: what the largest forward pass needs while it runs.
        graphs: buffers of captured steps.
        slots: of all layers.
        slots_per_layer: alike in all layers.
    """

    total: int
    backbone: int
    kv_cache: int
    staging: int
    workspace: int
    graphs: int
    slots: int
    slots_per_layer: int

    @property
    def used(self) -> int:
        """The sum of the parts."""
        return sum(asdict(self).values()) - self.total - self.slots_per_layer

    def __str__(self) -> str:
        parts = ("backbone", "kv_cache", "staging", "workspace", "graphs", "slots")
        said = ", ".join(f"{name} {format_bytes(getattr(self, name))}" for name in parts)
        return f"{format_bytes(self.total)}: {said} ({self.slots_per_layer} per layer)"


def share_budget(
    gpu_memory: str | int,
    layers: Sequence[ExpertsLayer],
    backbone: int,
    kv_cache: int,
    workspace: int,
    *,
    batch: int,
    context: int,
    staging_experts: int,
) -> GpuBudget:
    """
    Share a budget out: the most slots, alike in all layers, that fit beside the rest.

    Args:
        gpu_memory: such as ``"8GiB"``; an int is bytes.
        layers: in the format that slots hold.
        backbone: from `backbone_bytes`.
        kv_cache: from `cache_bytes`.
        workspace: from `workspace_bytes`.
        batch: sequences decoded at once, at most.
        context: tokens of a sequence, prompt included, at most.
        staging_experts: that one staging block holds.

    Raises:
        BudgetError: not even one slot per layer fits, with the smallest budget that works.
    """
    total = parse_bytes(gpu_memory)
    known = {
        "backbone": pieces(backbone),
        "kv_cache": kv_cache,
        "staging": staging_bytes(layers, staging_experts),
        "workspace": pieces(workspace) + _LIBRARIES,
        "graphs": _GRAPHS,
    }

    def slot_bytes(slots: int) -> int:
        return sum(
            pieces(min(slots, layer.num_experts) * part.nbytes)
            for layer in layers
            for part in layer.parts
        )

    rest = total - sum(known.values())
    most = max(layer.num_experts for layer in layers)
    slots = bisect_right(range(1, most + 1), rest, key=slot_bytes)
    if not slots:
        needed = total - rest + slot_bytes(1)
        raise BudgetError(
            f"a GPU memory of {format_bytes(total)} is too little for {batch} sequences of "
            f"{context} tokens with one expert of each layer; give {format_bytes(needed)} or more, "
            f"or fewer or shorter sequences ("
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in known.items())
            + ")"
        )
    return GpuBudget(total=total, **known, slots=slot_bytes(slots), slots_per_layer=slots)


def pieces(nbytes: int) -> int:
    """Bytes that PyTorch's allocator takes for a tensor of *nbytes*."""
    return -(-nbytes // _PIECE) * _PIECE if nbytes >= _SMALL else -(-nbytes // 512) * 512


def backbone_bytes(model: nn.Module, layers: Sequence[ExpertsLayer]) -> int:
    """Bytes of all parameters and buffers but the stacked experts', each memory counted once."""
    experts = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    sizes = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in experts:
            key = tensor.untyped_storage().data_ptr() if not tensor.is_meta else id(tensor)
            sizes[key] = -(-tensor.nbytes // 512) * 512
    return sum(sizes.values())


# --- asked of the model on the meta device ------------------------------------------------------


def cache_bytes(model: Any, layers: Sequence[ExpertsLayer], batch: int, context: int) -> int:
    """
    Bytes that the cache of *batch* sequences of *context* tokens takes, as the allocator counts.

    The family's static cache is filled by a pass without values, so latent attention, windows,
    indexers and recurrent states are what they are. For a family without one, the cache that grows
    is counted at its full length.

    Args:
        model: on the meta device.
        layers: its MoE layers.
        batch: sequences at once.
        context: tokens of a sequence, prompt included, at most.

    Raises:
        UnknownNeedError: the family's code looks at values, so neither cache can be counted.
    """
    try:
        cache = _static_cache(model, layers, batch, context)
        return sum(pieces(one.nbytes) for layer in cache.layers for one in tensors(layer))
    except RuntimeError:
        pass  # no static cache; the other may do
    try:
        seen = meta_pass.forward(model, layers, min(context, meta_pass.DIRECT))
        return batch * pieces(meta_pass.cache_bytes(model, layers, context, seen))
    except RuntimeError as error:
        raise _unknown(model, "the cache", error) from error


def workspace_bytes(model: Any, layers: Sequence[ExpertsLayer], batch: int, context: int) -> int:
    """
    Estimate the most memory that is alive at once in a prompt's pass, beside weights and cache.

    Each operation's outputs are followed until nobody holds them; so attention that keeps all
    probabilities is counted with them, and fused attention without. The experts' part is computed
    by us and added where they are called.

    Args:
        model, layers, batch, context: as for `cache_bytes`; every sequence has *context* tokens,
            and *layers* are in the format that slots hold.

    Raises:
        UnknownNeedError: the family's code looks at values.
    """
    most = 0

    def called(layer: ExpertsLayer, top_k_index: Tensor) -> None:
        nonlocal most
        most = max(most, live.bytes + _experts_bytes(layer, top_k_index.numel()))

    options: dict[str, Any] = {"use_cache": True}
    if getattr(model, "_supports_logits_to_keep", bool)():
        options["logits_to_keep"] = 1  # as generate does
    try:
        known: Iterable[Tensor] = ()
        try:
            cache = options["past_key_values"] = _static_cache(model, layers, batch, context)
            known = [one for layer in cache.layers for one in tensors(layer)]
        except RuntimeError:
            pass  # the cache that grows is counted with the pass
        ids = torch.zeros(batch, context, dtype=torch.long, device="meta")
        held = (ids, *model.parameters(), *model.buffers(), *known)
        with meta_pass.without_experts(model, layers, called), watched(held) as live:
            model(input_ids=ids, **options)
    except RuntimeError as error:
        raise _unknown(model, "a prompt", error) from error
    return max(most, live.most)


def _experts_bytes(layer: ExpertsLayer, pairs: int) -> int:
    """Memory that *pairs* (token, choice) pairs take if all are computed at once."""
    down = next(tensor for tensor in layer.tensors if tensor.name == "down_proj")
    unpacking = 0
    if not layer.format.exact:
        # One matrix is unpacked at a time, through float32; outputs are summed in float32.
        largest = max(math.prod(tensor.shape) for tensor in layer.tensors if tensor.is_matrix)
        unpacking = 16 * largest + 3 * 4 * pairs * down.rows_columns[0]
    larger, smaller = max(down.shape), min(down.shape)  # of hidden and intermediate size
    # Gathered inputs, both projections, the gated product, outputs and their weighted sum; and
    # eight indices.
    return unpacking + pairs * ((5 * larger + 4 * smaller) * down.dtype.itemsize + 8 * 8)


def _unknown(model: Any, what: str, error: Exception) -> UnknownNeedError:
    return UnknownNeedError(
        f"how much memory {what} of {model.config.model_type} takes cannot be told beforehand "
        f"({str(error).splitlines()[0][:80]}); give slots or expert_memory instead of gpu_memory"
    )


def _static_cache(
    model: Any, layers: Sequence[ExpertsLayer], batch: int, context: int
) -> StaticCache:
    """Fill the family's static cache without values; RuntimeError if it has none."""
    with meta_pass.without_experts(model, layers):
        cache = StaticCache(config=model.config, max_cache_len=context)
        ids = torch.zeros(batch, min(context, 2), dtype=torch.long, device="meta")
        model(input_ids=ids, past_key_values=cache)
    cache.reset()
    return cache


class Live(TorchDispatchMode):
    """
    Follows memory, from the operation that makes it until nobody holds it.

    Args:
        known: tensors whose memory is not counted.

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
    """Follow the memory of operations in the body, but for that of *known*; attention is fused."""
    live = Live(known)
    with _FusedAttention(), live:
        yield live


# --- kept ---------------------------------------------------------------------------------------


class Cap:
    """
    A limit on what the allocator takes on *device*, in the whole process; without effect on a CPU.

    A request that would need more fails with `torch.OutOfMemoryError`, and the next one works. The
    allocator knows one limit a device: a second cap replaces the first.

    Args:
        total: bytes.
        device: where.
    """

    def __init__(self, total: int, device: torch.device) -> None:
        self._total, self._device = total, device
        self._before: float | None = None

    def put(self) -> None:
        """Limit the allocator from now on."""
        if self._device.type == "cuda":
            memory = torch.cuda.get_device_properties(self._device).total_memory
            self._before = torch.cuda.get_per_process_memory_fraction(self._device)
            share = min(1.0, self._total / memory)
            torch.cuda.set_per_process_memory_fraction(share, self._device)

    def lift(self) -> None:
        """Allow again what was allowed before; without effect if the cap was not put."""
        if self._before is not None:
            torch.cuda.set_per_process_memory_fraction(self._before, self._device)
            self._before = None
