"""
Memory and slots: how many experts fit into an amount, never one more.

A GPU's budget holds the backbone, keys and values, a prompt's pass, staging blocks and captured
steps; the rest is slots. The CUDA context is not counted.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import StaticCache

from melinoe.engine.device.static_cache import tensors
from melinoe.errors import BudgetError, UnknownNeedError
from melinoe.host_memory import format_bytes, parse_bytes
from melinoe.moe import meta_pass
from melinoe.moe.experts import ExpertsLayer

# cuBLAS keeps 32 MiB on Hopper for each stream that computes; one computes, one captures.
_LIBRARIES = 64 << 20
_GRAPHS = 64 << 20
# PyTorch's allocator packs small tensors together, and gives large ones whole pieces.
_SMALL, _PIECE = 1 << 20, 2 << 20


def staging_bytes(layers: Sequence[ExpertsLayer], experts: int) -> int:
    """Bytes of the two blocks of so many *experts* for each distinct shape among *layers*."""
    return 2 * experts * sum({layer.parts: layer.block_bytes for layer in layers}.values())


def memory_of(slots: int | Sequence[int], layers: Sequence[ExpertsLayer]) -> int:
    """Bytes of *slots* per layer, or of each layer; none gets more slots than it has experts."""
    counts = [slots] * len(layers) if isinstance(slots, int) else slots
    each = zip(counts, layers, strict=True)
    return sum(min(count, layer.num_experts) * layer.block_bytes for count, layer in each)


def slots_for(expert_memory: str | int, layers: Sequence[ExpertsLayer]) -> int:
    """Find the most slots per layer within *expert_memory*; BudgetError if not even one fits."""
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
    """Slots of each layer, one number cut to a layer's experts; BudgetError if impossible."""
    most = [layer.num_experts for layer in layers]
    if isinstance(slots, int):
        if not 1 <= slots <= max(most):
            raise BudgetError(
                f"{slots} slots per layer do not work with {max(most)} experts; "
                f"give between 1 and {max(most)}"
            )
        return tuple(min(slots, experts) for experts in most)
    if len(slots) != len(layers):
        raise BudgetError(
            f"slots are given for {len(slots)} layers of {len(layers)}; give one number for each, "
            "or one for all"
        )
    for number, (count, experts) in enumerate(zip(slots, most, strict=True)):
        if not 1 <= count <= experts:
            raise BudgetError(
                f"{count} slots do not work in layer {number} with {experts} experts; "
                f"give between 1 and {experts}"
            )
    return tuple(map(int, slots))


# --- a GPU ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuBudget:
    """Split a budget's bytes by use; all parts add up to *total* or less."""

    total: int
    backbone: int
    kv_cache: int
    staging: int
    workspace: int
    graphs: int
    slots: int = 0
    slots_per_layer: int = 0

    @property
    def used(self) -> int:
        """The sum of the parts."""
        parts = self.backbone, self.kv_cache, self.staging, self.workspace, self.graphs
        return sum(parts) + self.slots

    def __str__(self) -> str:
        names = ("backbone", "kv_cache", "staging", "workspace", "graphs", "slots")
        said = ", ".join(f"{n} {format_bytes(getattr(self, n))}" for n in names if getattr(self, n))
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
    Share a budget out: the most slots, alike in all *layers* (as stored), that fit beside the rest.
    *kv_cache* and *workspace* are of `prompt_bytes`; *staging_experts* fit into one staging block.
    BudgetError with the smallest budget that works.
    """
    rest = GpuBudget(
        parse_bytes(gpu_memory), pieces(backbone), kv_cache, staging_bytes(layers, staging_experts),
        pieces(workspace) + _LIBRARIES, _GRAPHS,
    )  # fmt: skip

    def slot_bytes(slots: int) -> int:
        return sum(
            pieces(min(slots, layer.num_experts) * part.nbytes)
            for layer in layers
            for part in layer.parts
        )

    most = max(layer.num_experts for layer in layers)
    slots = bisect_right(range(1, most + 1), rest.total - rest.used, key=slot_bytes)
    if not slots:
        raise BudgetError(
            f"a GPU memory of {format_bytes(rest.total)} is too little for {batch} sequences of "
            f"{context} tokens with one expert of each layer; give "
            f"{format_bytes(rest.used + slot_bytes(1))} or more, or fewer or shorter sequences "
            f"({str(rest).split(': ')[1].split(' (')[0]})"
        )
    return replace(rest, slots=slot_bytes(slots), slots_per_layer=slots)


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


class PromptBytes(NamedTuple):
    """Memory of a prompt's pass: *cache* stays after it, *workspace* is the most beside it."""

    cache: int
    workspace: int


def prompt_bytes(
    model: Any, layers: Sequence[ExpertsLayer], batch: int, context: int
) -> PromptBytes:
    """
    Ask a model on the meta device for the memory of the largest pass: a prompt in every sequence.

    Each operation's outputs are followed until nobody holds them; the experts' part is computed by
    us and added where they are called. A family without a static cache is counted with the one that
    grows. UnknownNeedError where the family's code looks at values.
    """
    most = 0

    def called(layer: ExpertsLayer, top_k_index: Tensor) -> None:
        nonlocal most
        most = max(most, live.bytes + _experts_bytes(layer, top_k_index.numel()))

    options: dict[str, Any] = {"use_cache": True}
    if getattr(model, "_supports_logits_to_keep", bool)():
        options["logits_to_keep"] = 1  # as generate does
    kept: list[Tensor] = []
    try:
        with meta_pass.without_experts(model, layers):
            cache = StaticCache(config=model.config, max_cache_len=context)
            ids = torch.zeros(batch, min(context, 2), dtype=torch.long, device="meta")
            model(input_ids=ids, past_key_values=cache)
        cache.reset()
        options["past_key_values"] = cache
        kept = [one for layer in cache.layers for one in tensors(layer)]
    except RuntimeError:
        pass  # no static cache: the one that grows stays alive with the pass's output
    ids = torch.zeros(batch, context, dtype=torch.long, device="meta")
    known = (ids, *model.parameters(), *model.buffers(), *kept)
    try:
        with meta_pass.without_experts(model, layers, called), watched(known) as live:
            output = model(input_ids=ids, **options)
    except RuntimeError as error:
        raise UnknownNeedError(
            f"how much memory a prompt of {model.config.model_type} takes cannot be told "
            f"beforehand ({str(error).splitlines()[0][:80]}); give slots or expert_memory instead "
            "of gpu_memory"
        ) from error
    grown = 0 if kept else live.bytes
    del output
    return PromptBytes(grown + sum(pieces(t.nbytes) for t in kept), max(most, live.most) - grown)


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


class Live(TorchDispatchMode):
    """Follow memory from the operation that makes it until nobody holds it, but that of *known*."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.most = 0  # alive now, and at once at most
        self._known = weakref.WeakSet(one.untyped_storage() for one in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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


def cap_memory(total: int, device: torch.device) -> Callable[[], None]:
    """Limit what a GPU's allocator takes in the process to *total* bytes; returns the undo."""
    before: list[float] = []
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        before.append(torch.cuda.get_per_process_memory_fraction(device))
        torch.cuda.set_per_process_memory_fraction(min(1.0, total / memory), device)

    def lift() -> None:
        if before:
            torch.cuda.set_per_process_memory_fraction(before.pop(), device)

    return lift
