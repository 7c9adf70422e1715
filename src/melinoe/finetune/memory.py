"""
Forecast the memory of a run whose experts are in a store, and keep it within a budget.

Everything is counted from shapes: a config suffices. The budget is the GPU's, or the host's where
the CPU computes. Layers are recomputed in the backward pass, if the model can.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object

from melinoe.checkpoint.backbone import layers_of
from melinoe.checkpoint.opening import Checkpoint
from melinoe.config import FinetuneSettings
from melinoe.errors import BudgetError
from melinoe.finetune.objective import REPLAYED_AT_ONCE
from melinoe.finetune.rates import default_rank
from melinoe.finetune.stream import ExpertStream, buffer_bytes
from melinoe.host_memory import format_bytes
from melinoe.losses.next_token import LOGITS_AT_ONCE
from melinoe.moe.attention import find_attention
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.disk_store import DiskStore
from melinoe.stores.ram_store import PinnedStore, RamStore

PROCESS_BYTES = 640 << 20  # Python with torch and transformers, before a model
CONTEXT_BYTES = 600 << 20  # CUDA's own
TRAINED_BYTES = 16  # a trained number with its gradient and Adam's two moments
_FEWEST, _MOST = 2, 8  # buffers


@dataclass(frozen=True)
class Memory:
    """Count the bytes that a run takes on the device that computes, by part."""

    process: int  # before any model
    backbone: int  # weights outside the experts
    trained: int  # routers and low-rank updates, with gradients and optimiser
    activations: int  # what each layer keeps for the backward pass, and one layer's work
    logits: int  # of some tokens at a time, with their gradient
    buffers: int  # for experts on their way through

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = [f"{name} {format_bytes(n)}" for name, n in asdict(self).items() if n]
        return f"{format_bytes(self.total)} ({', '.join(parts)})"


@dataclass(frozen=True)
class Plan:
    """How a run keeps its budget."""

    memory: Memory
    budget_bytes: int  # of the device that computes
    store: str  # "pinned" or "disk"
    expert_bytes: int  # of all experts, as they are stored
    buffers: int  # groups of experts held at once
    chunk: int  # experts of a group
    host_updates: int = 0  # bytes of updates with gradients and optimiser, if kept on the host

    @property
    def measuring_bytes(self) -> int:
        """Give the bytes that the budget leaves to resident experts while the model is measured."""
        memory = self.memory
        taken = memory.process + memory.backbone + memory.activations + memory.logits
        return self.budget_bytes - taken

    def __str__(self) -> str:
        where = "on disk" if self.store == "disk" else "in pinned host memory"
        if self.host_updates:
            where += f", {format_bytes(self.host_updates)} of low-rank updates on the host"
        return (
            f"training takes {self.memory} of {format_bytes(self.budget_bytes)}; "
            f"{format_bytes(self.expert_bytes)} of experts wait {where}, "
            f"{self.buffers * self.chunk} pass through at a time"
        )


def plan_run(
    model: Any,
    layers: Sequence[ExpertsLayer],
    backbone_bytes: int,
    settings: FinetuneSettings,
    tokens: int,
    *,
    top_k: int,
    budget_bytes: int,
    host_bytes: int | None = None,
    on_gpu: bool = False,
    processes: int = 1,
) -> Plan:
    """
    Choose the buffers and the store for a run within a budget.

    *model* may be on the meta device; *layers* are in the format of the store. *tokens*: of a
    forward pass, rows times the longest; each takes *top_k* experts. *budget_bytes*: of the GPU, or
    of the host where the CPU computes; *host_bytes*: what experts and updates may take of the host
    beside GPUs, absent: none, so that experts are read from disk. *processes* of a machine share
    the experts in host memory and nothing else. BudgetError: it does not fit; the sentence names
    the smallest budget that does.
    """
    text = model.config.get_text_config(decoder=True)
    hidden, depth, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    size = 2 if settings.compute_dtype == "bfloat16" else 4
    replayed = REPLAYED_AT_ONCE * settings.max_length if settings.lambda_replay > 0 else 0
    passes, most = tokens + replayed, max(tokens, replayed)  # both graphs live at the same time
    # Every layer's input, and its experts' output, which is not computed again.
    kept = (depth + len(layers)) * passes * hidden * size
    scores = 0 if on_gpu else 3 * heads * settings.max_length * most * size
    routed = 4 * most * top_k * hidden * size  # rows, their gradients, and what the sums gather
    inner = max(max(part.shape[0] for part in layer.tensors) for layer in layers)
    rows = most * (3 * hidden + 4 * inner) * 4  # of one expert, if all tokens chose it
    matrix = max(part.shape[0] * part.shape[-1] for part in layers[0].tensors if part.is_matrix)
    work = max(12 * most * hidden * 4 + scores, routed + rows + 2 * 4 * matrix)
    # Of some tokens logits four times in float32, and the states that they are made of.
    logits = 16 * min(most * vocabulary, max(vocabulary, LOGITS_AT_ONCE))
    rank = settings.lora_rank or default_rank(top_k)
    routers = sum(layer.num_experts * hidden for layer in layers)
    updates = attention = 0
    if settings.train != "router":
        updates = sum(
            layer.num_experts * rank * sum(part.shape)
            for layer in layers
            for part in layer.tensors
            if part.is_matrix
        )
    if settings.train == "router+experts+attention":
        linears = find_attention(model, layers).values()
        attention = sum(rank * (one.in_features + one.out_features) for one in linears)
    fixed = Memory(
        process=CONTEXT_BYTES if on_gpu else PROCESS_BYTES,
        backbone=backbone_bytes,
        trained=TRAINED_BYTES * (routers + updates + attention),
        activations=kept + work,
        logits=logits + 2 * passes * hidden * size + (64 << 20),
        buffers=0,
    )
    block = max(map(buffer_bytes, layers))
    fewest = max(layer.num_experts for layer in layers)
    room, host_updates = (budget_bytes - fixed.total) // block, 0
    if room < _FEWEST and on_gpu and host_bytes is not None and updates:
        host_updates = TRAINED_BYTES * updates
        fixed = replace(fixed, trained=fixed.trained - host_updates)
        room = (budget_bytes - fixed.total) // block
        host_bytes -= host_updates * processes
        if host_bytes < 0:
            raise BudgetError(
                f"the low-rank updates take {format_bytes(host_updates * processes)} of the host; "
                "raise --ram to that, raise --gpu-memory, or lower --lora-rank"
            )
    # While the model is measured, one expert of each layer is held where the updates were trained.
    held = 0 if on_gpu else sum(map(buffer_bytes, layers)) - fixed.trained
    least_blocks = max(_FEWEST, -(-held // block))
    if room < least_blocks:
        least = fixed.total + least_blocks * block
        option = "--gpu-memory" if on_gpu else "--ram"
        raise BudgetError(
            f"training takes at least {format_bytes(least)}: {fixed}, and "
            f"{format_bytes(least_blocks * block)} of buffers; raise {option} to "
            f"{format_bytes(least)}, or lower --batch-size, --max-length or --lora-rank"
        )
    # A GPU multiplies several experts at once; a CPU one by one.
    chunk = max(1, min(8, room // 3, fewest)) if on_gpu else 1
    buffers = min(_MOST, room // chunk, max(_FEWEST, -(-fewest // chunk)))
    expert_bytes = sum(layer.num_experts * layer.block_bytes for layer in layers)
    pinned = on_gpu and host_bytes is not None and expert_bytes <= host_bytes
    memory = Memory(**asdict(fixed) | {"buffers": buffers * chunk * block})
    store = "pinned" if pinned else "disk"
    return Plan(memory, budget_bytes, store, expert_bytes, buffers, chunk, host_updates)


def open_stream(
    checkpoint: Checkpoint, model: Any, plan: Plan, device: torch.device, local_rank: int = 0
) -> ExpertStream:
    """Put a checkpoint's experts into the planned store, and make the stream that reads them."""
    layers = stored_layers(checkpoint, model)
    store: Any = DiskStore(checkpoint, layers)
    if plan.store == "pinned":
        store = shared_store(PinnedStore, checkpoint, layers, local_rank)
    updates_on = torch.device("cpu") if plan.host_updates else None
    return ExpertStream(
        store, layers, device, buffers=plan.buffers, chunk=plan.chunk, updates_on=updates_on
    )


def shared_store(
    kind: type[RamStore], checkpoint: Checkpoint, layers: Sequence[ExpertsLayer], local_rank: int
) -> RamStore:
    """Fill a store that the processes of a run on one machine share; the first of them reads."""
    if not torch.distributed.is_initialized():
        return _fill(kind(layers), checkpoint, layers)
    store, memory = None, None
    if local_rank == 0:
        memory = os.memfd_create("melinoe-experts")
        store = _fill(kind(layers, f"/proc/self/fd/{memory}"), checkpoint, layers)
    place = (platform.node(), f"/proc/{os.getpid()}/fd/{memory}")
    places = dict(one for one in gather_object([place if memory is not None else None]) if one)
    if store is None:
        store = kind(layers, places[platform.node()])
    torch.distributed.barrier()  # all have mapped it
    if memory is not None:
        os.close(memory)
    return store


def _fill(store: RamStore, checkpoint: Checkpoint, layers: Sequence[ExpertsLayer]) -> RamStore:
    for layer, source in zip(layers, checkpoint.experts, strict=True):
        for expert in range(layer.num_experts):
            source.read_block(expert, layer.format, store.views(layer.index, expert))
    return store


def describe(plan: Plan, stream: ExpertStream) -> dict[str, Any]:
    """Say for a run's record what was planned, how experts were stored, and what was read."""
    formats = {stream.store.format(layer.index).name for layer in stream.layers}
    return {
        "store": stream.store.kind,
        "experts": sum(layer.num_experts for layer in stream.layers),
        "experts_held": plan.buffers * plan.chunk,
        "format": ", ".join(sorted(formats)),
        "budget_bytes": plan.budget_bytes,
        "memory": asdict(plan.memory),
        "measuring_bytes": plan.measuring_bytes,
        "reads": asdict(stream.reads),
    }


def stored_layers(checkpoint: Checkpoint, model: Any) -> list[ExpertsLayer]:
    """The layers of *model*, in the formats in which the checkpoint stores their experts."""
    found = layers_of(checkpoint, model)
    return [
        layer.stored_as(source.format)
        for layer, source in zip(found, checkpoint.experts, strict=True)
    ]
