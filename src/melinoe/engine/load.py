"""From a checkpoint to a model that runs offloaded, without ever holding all of it twice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import tqdm

from melinoe.cache.policy import Policy
from melinoe.checkpoint.backbone import layers_of, load_backbone
from melinoe.checkpoint.opening import Checkpoint, open_checkpoint
from melinoe.config import STORES
from melinoe.engine.attach import Handle, attach_stores, checked_settings
from melinoe.engine.budget import slots_by_layer
from melinoe.engine.disk_store import DiskStore
from melinoe.engine.misses import Misses, check_miss
from melinoe.engine.ram_store import PinnedStore, RamStore
from melinoe.engine.store import Store
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import AttachError
from melinoe.host_memory import check_host_room, format_bytes, free_host_bytes

_log = logging.getLogger("melinoe")

# Reading is bound by the disk; more readers than this gained nothing.
_READERS = 4

# Of the memory that is free, what "auto" would pin at most: the rest is for the system's own use.
_PINNABLE_SHARE = 0.8


def load(
    name: str | Path,
    device: torch.device | str = "cpu",
    *,
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = "lru",
    policy_options: Mapping[str, Any] | None = None,
    store: str = "auto",
    dtype: torch.dtype | str = "auto",
    link: EmulatedLink | None = None,
    miss: str | Misses = "wait",
    miss_threads: int | None = None,
) -> tuple[Any, Handle]:
    """
    Load a checkpoint for offloaded use: the backbone on *device*, a few experts in slots beside it.

    Experts go straight from the shards' bytes to where they stay. Host memory peaks near the
    experts' bytes plus the backbone with a store in RAM, and near the slots plus the backbone with
    the store on disk (`benchmarks/load_memory.py`).

    Args:
        name: A directory in the hub's layout, or the name of a repository on the hub.
        device: Where the backbone and the slots go: "cpu", "cuda", "cuda:1".
        slots: Experts per layer to keep in fast memory, 1 to all; or of each layer.
        expert_memory: The same as a budget for all layers, such as ``"8GiB"``; never exceeded.
        policy: Name of a cache policy, or a function that makes one per layer.
        policy_options: What the named policy takes, such as ``{"gamma": 0.9}`` for ``lfu``.
        store: Where experts wait: "ram", "pinned" (for a GPU), "disk". "auto" pins them for a GPU
            if they fit into the host's free memory, and else leaves them on disk.
        dtype: Type of all weights; "auto" takes the config's.
        link: Emulate a slow link; on the CPU only.
        miss, miss_threads: As for `melinoe.engine.attach.attach`. With a store on disk the host
            reads the missing expert into a buffer of its own, which is no transfer into a slot.

    Returns:
        The transformers model, in evaluation mode, on which ``generate`` works as always; and the
        handle with counters, prefetch and record. The tokenizer is the caller's to load.

    Raises:
        CheckpointError: files missing, torn, quantised, or of another model than the config's.
        UnsupportedModelError: the family has no experts that can be served.
        BudgetError: neither or both of *slots* and *expert_memory*; or too little memory, also of
            the host's for all experts.
        AttachError: an unknown store or way to handle misses, or a device that is not there.
    """
    target = _device(device)
    check_miss(miss, miss_threads)
    if store not in STORES:
        raise AttachError(f"there is no store {store!r}; choose one of {', '.join(STORES)}")
    checkpoint = open_checkpoint(str(name), dtype)
    try:
        options: dict[str, Any] = {
            "slots": slots,
            "expert_memory": expert_memory,
            "policy": policy,
            "policy_options": policy_options,
            "link": link,
            "device": target,
        }
        # Before anything is read.
        count, _, _ = checked_settings(checkpoint.layers[0].module, checkpoint.layers, **options)
        kind = _auto(checkpoint, target) if store == "auto" else store
        _check_room(checkpoint, kind, target, count)
        model = load_backbone(checkpoint, target)
        layers = layers_of(checkpoint, model)
        filled = _fill(checkpoint, kind)
        at_detach = checkpoint.close if kind == "disk" else None
        handle = attach_stores(
            model, layers, filled, miss=miss, miss_threads=miss_threads, at_detach=at_detach,
            **options,
        )  # fmt: skip
    except BaseException:
        checkpoint.close()
        raise
    if kind != "disk":
        checkpoint.close()
    return model, handle


def _fill(checkpoint: Checkpoint, kind: str) -> Store:
    """A store with all experts in it; the disk's has them already."""
    if kind == "disk":
        return DiskStore(checkpoint)
    store = (PinnedStore if kind == "pinned" else RamStore)(checkpoint.layers)

    def fill(place: tuple[int, int]) -> None:
        layer, expert = place
        checkpoint.experts[layer].read(expert, store.views(layer, expert))

    fill_all(checkpoint, fill)
    return store


def fill_all(checkpoint: Checkpoint, fill: Callable[[tuple[int, int]], None]) -> None:
    """Call *fill* with (layer, expert) for every expert, in several threads where that helps."""
    places = [
        (index, expert)
        for index, layer in enumerate(checkpoint.layers)
        for expert in range(layer.num_experts)
    ]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="melinoe-fill") as pool:
        for _ in tqdm(pool.map(fill, places), total=len(places), desc="Loading experts"):
            pass


def _auto(checkpoint: Checkpoint, device: torch.device) -> str:
    """Pinned if a GPU is to be served and the experts fit; else disk."""
    kind = "disk"
    free = free_host_bytes() or 0
    if device.type == "cuda" and checkpoint.expert_bytes <= _PINNABLE_SHARE * free:
        kind = "pinned"
    _log.info("store: %s, for %s of experts on %s",
              kind, format_bytes(checkpoint.expert_bytes), device)  # fmt: skip
    return kind


def _check_room(
    checkpoint: Checkpoint, kind: str, device: torch.device, slots: int | Sequence[int]
) -> None:
    """Refuse what the system would end the process for: before anything is read."""
    parts = {"experts": 0 if kind == "disk" else checkpoint.expert_bytes}
    if device.type == "cpu":
        counts = slots_by_layer(slots, checkpoint.layers)
        parts["slots"] = sum(
            n * layer.block_bytes for n, layer in zip(counts, checkpoint.layers, strict=True)
        )
        parts["all other weights"] = checkpoint.backbone_bytes
    what = " and ".join(f"{format_bytes(size)} of {part}" for part, size in parts.items() if size)
    fewer = "give fewer slots" if kind == "disk" else "choose the disk store, or fewer slots"
    check_host_room(sum(parts.values()), what, fewer)


def _device(device: torch.device | str) -> torch.device:
    """The device, if it is there."""
    try:
        target = torch.device(device)
    except RuntimeError:
        raise AttachError(f"there is no device {str(device)!r}; use cpu or cuda") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise AttachError(f"this machine has no device {target}; use cpu, or another GPU")
    return target
