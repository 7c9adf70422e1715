"""
A budget of GPU memory as a contract: everything is counted, and what is left goes to slots.

What is counted beside the slots: the backbone's weights as they lie in memory; the cache of *batch*
sequences of *context* tokens; the staging blocks; what the largest forward pass, a prompt
of *context* tokens in every sequence, needs while it runs; and the buffers of captured steps.
PyTorch's allocator gives large tensors whole pieces of 2 MiB, and so does this arithmetic. The CUDA
context itself, some hundred MiB that no allocator sees, is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import nn

from melinoe.engine.budget import format_bytes, parse_bytes
from melinoe.engine.device.allocator import pieces
from melinoe.engine.device.staging import staging_bytes
from melinoe.errors import BudgetError
from melinoe.moe.experts import ExpertsLayer

# cuBLAS keeps 32 MiB on Hopper for each stream that computes; one computes, one captures.
_LIBRARIES = 64 << 20
_GRAPHS = 64 << 20


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


def plan_budget(
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
    Share a budget out.

    Args:
        gpu_memory: such as ``"8GiB"``; an int is bytes.
        layers: as `find_experts` lists them.
        backbone: bytes of everything that is not experts; see `backbone_bytes`.
        kv_cache: bytes of the cache of *batch* sequences; see `melinoe.engine.device.cache_bytes`.
        workspace: bytes that a prompt's pass needs; see `melinoe.engine.device.workspace`.
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
        "staging": staging_bytes(tuple(layers), staging_experts),
        "workspace": pieces(workspace) + _LIBRARIES,
        "graphs": _GRAPHS,
    }
    rest = total - sum(known.values())
    smallest = _slot_bytes(layers, 1)
    if rest < smallest:
        needed = total - rest + smallest
        raise BudgetError(
            f"a GPU memory of {format_bytes(total)} is too little for {batch} sequences of "
            f"{context} tokens with one expert of each layer; give {format_bytes(needed)} or more, "
            f"or fewer or shorter sequences ("
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in known.items())
            + ")"
        )
    low, high = 1, max(layer.num_experts for layer in layers)
    while low < high:
        middle = (low + high + 1) // 2
        if _slot_bytes(layers, middle) <= rest:
            low = middle
        else:
            high = middle - 1
    return GpuBudget(total=total, **known, slots=_slot_bytes(layers, low), slots_per_layer=low)


def backbone_bytes(model: nn.Module, layers: Sequence[ExpertsLayer]) -> int:
    """Bytes of all parameters and buffers but the stacked experts', each memory counted once."""
    experts = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    sizes = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in experts:
            key = tensor.untyped_storage().data_ptr() if not tensor.is_meta else id(tensor)
            sizes[key] = -(-tensor.nbytes // 512) * 512
    return sum(sizes.values())


def _slot_bytes(layers: Sequence[ExpertsLayer], slots: int) -> int:
    return sum(
        pieces(min(slots, layer.num_experts) * tensor.nbytes)
        for layer in layers
        for tensor in layer.tensors
    )
