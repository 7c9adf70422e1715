"""Attach the fast engine to a transformers model in memory, or load a checkpoint with it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from melinoe.cache.packing import PACKABLE
from melinoe.cache.policy import Policy
from melinoe.cache.residency import StreamedPrefill
from melinoe.checkpoint.backbone import layers_of, load_backbone
from melinoe.checkpoint.opening import Checkpoint, build_on_meta, open_checkpoint
from melinoe.engine.attach import checked_settings
from melinoe.engine.device.budget import (
    Cap,
    GpuBudget,
    backbone_bytes,
    cache_bytes,
    plan_budget,
    workspace_bytes,
)
from melinoe.engine.device.carrier import FastStore
from melinoe.engine.device.compressed import CompressedStore
from melinoe.engine.device.handle import FastHandle
from melinoe.engine.device.static_cache import cache_length
from melinoe.engine.device.support import why_not
from melinoe.engine.load import fill_all
from melinoe.engine.ram_store import PinnedStore, RamStore
from melinoe.engine.weights import give_weights_back
from melinoe.errors import AttachError, BudgetError
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.moe.experts import ExpertsLayer, find_experts, without_wrapper

_log = logging.getLogger("melinoe")

# Experts that one of the two staging blocks holds: enough for a copy to outlast its launch.
STAGING_EXPERTS = 4


def attach(
    model: nn.Module,
    *,
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = "lru",
    policy_options: Mapping[str, Any] | None = None,
    compression: str | None = None,
    admit: int | None = None,
    staging_experts: int = STAGING_EXPERTS,
    graphs: bool | None = None,
    compile: bool | None = None,
    store: FastStore | None = None,
    device: torch.device | str | None = None,
) -> FastHandle:
    """
    Offload the experts of a model in memory to page-locked host memory, and run it from slots.

    Args:
        model: a transformers model of a decorated family.
        slots: experts per layer to keep on the device, 1 to all; or of each layer.
        expert_memory: the same as a budget for all layers, such as ``"8GiB"``; never exceeded.
        policy: ``lru`` or ``lfu``, or a function that makes one of them per layer.
        policy_options: what the named policy takes, such as ``{"gamma": 0.9}`` for ``lfu``.
        compression: ``int8`` or ``int4``: keep experts as codes, expanded as they are copied. The
            exact weights are gone. Absent: as they are, and every result with them.
        admit: experts of a prompt that may evict others; see `StreamedPrefill`.
        staging_experts: what one of the two staging blocks holds.
        graphs: replay decode steps from CUDA graphs; absent: where there is CUDA.
        compile: capture decode steps of fewer kernels, made by ``torch.compile``. The first steps
            of a batch size and cache length take as long as compiling does, and fused kernels round
            otherwise: the last bits of logits change.
        store: holds this model's experts already.
        device: where the slots are; absent means where the rest of the model is.

    Raises:
        AttachError: the engine cannot run here, or the model is not in memory, or attached already.
        UnsupportedModelError, BudgetError, MelinoeError: as `melinoe.attach`.
    """
    model = without_wrapper(model)
    layers = find_experts(model)
    for layer in layers:
        if store is None and any(p.is_meta for p in layer.module.parameters(recurse=False)):
            raise AttachError(
                f"the experts of {layer.name} are not in memory (they are on the meta device); "
                "load the model without device_map, or with melinoe.load"
            )
    count, make, target = checked_settings(
        model, layers, slots, expert_memory, policy, policy_options, None, device
    )
    use_graphs = _graphs(graphs, compile, target)
    _check(layers, make, target, staging_experts)
    filled = store
    if filled is None:
        filled = _from_modules(layers, compression, target)
    try:
        return FastHandle(
            model, layers, filled, count, make, target, StreamedPrefill(admit), staging_experts,
            use_graphs, bool(compile),
        )  # fmt: skip
    except BaseException:
        for layer in layers:
            give_weights_back(layer, filled)
        raise


def load(
    name: str | Path,
    device: torch.device | str = "cuda",
    *,
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = "lru",
    policy_options: Mapping[str, Any] | None = None,
    compression: str | None = None,
    admit: int | None = None,
    staging_experts: int = STAGING_EXPERTS,
    graphs: bool | None = None,
    compile: bool | None = None,
    dtype: torch.dtype | str = "auto",
    gpu_memory: str | int | None = None,
    batch: int | None = None,
    context: int | None = None,
    store: FastStore | None = None,
) -> tuple[Any, FastHandle]:
    """
    Load a checkpoint for the fast engine: the backbone on *device*, the experts in pinned memory.

    Args:
        name: a directory in the hub's layout, or the name of a repository on the hub.
        device: where the backbone and the slots go.
        dtype: type of all weights; "auto" takes the config's.
        slots, expert_memory, policy, policy_options, compression, admit, staging_experts, graphs,
            compile: as for `attach`.
        gpu_memory: instead of *slots* or *expert_memory*: a budget for all that PyTorch allocates
            on the device, such as ``"8GiB"``, kept as a contract; see `device.budget`.
        batch: sequences at once that *gpu_memory* is to hold; absent: 1.
        context: tokens of a sequence that it is to hold; absent: 2,048.
        store: holds this checkpoint's experts already, of another handle on the same device.

    Returns:
        The transformers model, in evaluation mode, and its handle.

    Raises:
        CheckpointError: files missing, torn, quantised, or of another model than the config's.
        AttachError, UnsupportedModelError, BudgetError, MelinoeError: as `attach`.
    """
    if gpu_memory is None and (batch is not None or context is not None):
        raise BudgetError("batch and context say what gpu_memory is to hold; give it, or none")
    if gpu_memory is not None and (slots is not None or expert_memory is not None):
        raise BudgetError("give one of slots, expert_memory and gpu_memory, and not two")
    asked = 1 if gpu_memory is not None else slots
    staging = staging_experts
    with open_checkpoint(str(name), dtype) as checkpoint:
        count, make, target = checked_settings(
            checkpoint.layers[0].module, checkpoint.layers, asked, expert_memory, policy,
            policy_options, None, torch.device(device),
        )  # fmt: skip
        use_graphs = _graphs(graphs, compile, target)
        _check(checkpoint.layers, make, target, staging)
        if store is None and compression is None:
            size = checkpoint.expert_bytes
            check_host_room(
                size, f"{format_bytes(size)} of experts", 'give compression="int8" or "int4", or '
                'choose engine="reference" with store="disk"',
            )  # fmt: skip
        model = load_backbone(checkpoint, target)
        layers = layers_of(checkpoint, model)
        budget: GpuBudget | None = None
        cap: Cap | None = None
        if gpu_memory is not None:
            sequences, tokens = batch or 1, cache_length(context or 2048, bool(compile))
            hollow = build_on_meta(
                checkpoint.model_class, copy.deepcopy(checkpoint.config), checkpoint.dtype
            )
            asked_of = hollow, find_experts(hollow), sequences, tokens
            budget = plan_budget(
                gpu_memory, layers, backbone_bytes(model, layers),
                cache_bytes(*asked_of), workspace_bytes(*asked_of),
                batch=sequences, context=tokens, staging_experts=staging,
            )  # fmt: skip
            _log.info("GPU memory of %s", budget)
            count = budget.slots_per_layer
        with ExitStack() as undo:
            if budget is not None:
                cap = Cap(budget.total, target)
                undo.callback(cap.lift)
                cap.put()
            filled = store or _from_checkpoint(checkpoint, compression, target)
            handle = FastHandle(
                model, layers, filled, count, make, target, StreamedPrefill(admit), staging,
                use_graphs, bool(compile), budget, cap,
            )  # fmt: skip
            undo.pop_all()  # the handle lifts it now
    return model, handle


def _graphs(asked: bool | None, compile: bool | None, device: torch.device) -> bool:
    """Whether decode steps are captured."""
    graphs = device.type == "cuda" if asked is None else asked
    if compile and not graphs:
        raise AttachError(
            "compile=True compiles the decode steps that CUDA graphs capture, and none are "
            "captured; leave graphs on, or leave compile out"
        )
    return graphs


def _check(
    layers: Sequence[ExpertsLayer],
    policies: Sequence[Callable[[], Policy]],
    device: torch.device,
    staging_experts: int,
) -> None:
    """Whatever can be refused before anything is read or moved."""
    reason = why_not(device)
    if reason is not None:
        raise AttachError(f'the fast engine cannot run here: {reason}; use engine="reference"')
    for name in {make().name for make in policies} - set(PACKABLE):
        raise AttachError(
            f"the fast engine decides by {' or '.join(PACKABLE)}, not by {name}; choose one of "
            'those, or engine="reference"'
        )
    if staging_experts < 1:
        raise AttachError(f"staging_experts cannot be {staging_experts}; give 1 or more")


def _from_modules(
    layers: Sequence[ExpertsLayer], compression: str | None, device: torch.device
) -> FastStore:
    pinned = device.type == "cuda"
    if compression is not None:
        return CompressedStore.from_modules(layers, compression, pinned)
    return (PinnedStore if pinned else RamStore).from_modules(layers)


def _from_checkpoint(
    checkpoint: Checkpoint, compression: str | None, device: torch.device
) -> FastStore:
    """All experts, read from the shards and kept as the engine wants them."""
    pinned = device.type == "cuda"
    store: FastStore
    if compression is not None:
        store = CompressedStore(checkpoint.layers, compression, pinned)
    else:
        store = (PinnedStore if pinned else RamStore)(checkpoint.layers)

    def fill(place: tuple[int, int]) -> None:
        layer, expert = place
        if isinstance(store, CompressedStore):
            tensors = checkpoint.layers[layer].tensors
            whole = {t.name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in tensors}
            checkpoint.experts[layer].read(expert, whole)
            store.write(layer, expert, whole)
        else:
            checkpoint.experts[layer].read(expert, store.views(layer, expert))

    fill_all(checkpoint, fill)
    return store
