"""Attach the runtime to a transformers model in memory: the experts move out, slots move in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from melinoe.cache.policy import Policy, policy_makers
from melinoe.engine.budget import slots_by_layer, slots_for
from melinoe.engine.handle import Handle
from melinoe.engine.misses import Misses, check_miss, measure_misses
from melinoe.engine.ram_store import PinnedStore, RamStore
from melinoe.engine.store import Store
from melinoe.engine.transfer import EmulatedLink, check_link
from melinoe.engine.weights import give_weights_back
from melinoe.errors import AttachError, BudgetError
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.moe.dispatch import bound
from melinoe.moe.experts import ExpertsLayer, find_experts, without_wrapper

__all__ = ["EmulatedLink", "Handle", "attach", "attach_stores"]

_STORES: dict[str, type[RamStore]] = {"ram": RamStore, "pinned": PinnedStore}


def attach(
    model: nn.Module,
    *,
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = "lru",
    policy_options: Mapping[str, Any] | None = None,
    store: str | Store = "ram",
    link: EmulatedLink | None = None,
    miss: str | Misses = "wait",
    miss_threads: int | None = None,
    device: torch.device | str | None = None,
) -> Handle:
    """
    Offload the experts of a model in memory, and run them from a few slots per layer.

    The stacked weights are moved into the store and freed; the model computes the same as before,
    ``generate`` included, without gradients. It cannot be
    saved, moved or cast until `Handle.detach`.

    Args:
        model: a transformers model of a decorated family, or PEFT's model around one, with
            adapters on any module but the experts.
        slots: experts per layer to keep in fast memory, 1 to all; or of each layer, as
            `melinoe.cache.allocate` makes them.
        expert_memory: the same as a budget for all layers, such as ``"8GiB"``; never exceeded.
        policy: name of a cache policy, or a function that makes one per layer.
        policy_options: what the named policy takes, such as ``{"gamma": 0.9}`` for ``lfu``.
        store: ``ram``, ``pinned``, or a store that holds this model's experts already.
        link: emulate a slow link; on the CPU only.
        miss: ``wait`` for the expert to come; ``cpu``: the host computes it where it is, and
            nothing is loaded on demand, so that slots hold what prefetches bring; ``split``: by
            cost, which is measured now. Or another handle's ``misses``, to decide by its figures.
        miss_threads: torch's threads while the host computes misses; absent: measured now.
        device: where the slots are; absent means where the rest of the model is.

    Raises:
        UnsupportedModelError: the model's family or layout cannot be served.
        BudgetError: neither or both of *slots* and *expert_memory*; or too little memory.
        AttachError: a runtime is attached already; weights that are not in memory; no way to pin; a
            store of another model; an unknown way to handle misses.
        MelinoeError: no such policy.
    """
    model = without_wrapper(model)
    layers = find_experts(model)
    check_miss(miss, miss_threads)
    if isinstance(store, str):
        _check_in_memory(layers, store)
    else:
        _check_fits(layers, store)
    count, make, target = checked_settings(
        model, layers, slots, expert_memory, policy, policy_options, link, device
    )
    if target.type == "cpu":
        each = zip(slots_by_layer(count, layers), layers, strict=True)
        size = sum(number * layer.block_bytes for number, layer in each)
        check_host_room(size, f"{format_bytes(size)} of slots", "give fewer slots")
    filled: Store = _STORES[store].from_modules(layers) if isinstance(store, str) else store
    try:
        misses = _misses(miss, layers, filled, target, link, miss_threads)
        return Handle(model, layers, filled, count, make, link, target, misses=misses)
    except BaseException:
        for layer in layers:
            give_weights_back(layer, filled)
        raise


def attach_stores(
    model: nn.Module,
    layers: Sequence[ExpertsLayer],
    store: Store,
    *,
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = "lru",
    policy_options: Mapping[str, Any] | None = None,
    link: EmulatedLink | None = None,
    miss: str | Misses = "wait",
    miss_threads: int | None = None,
    device: torch.device | str | None = None,
    at_detach: Callable[[], None] | None = None,
) -> Handle:
    """
    Attach to a model whose experts never were in memory: their weights are on the meta device.

    Args:
        model: its other weights are in memory.
        layers: as `find_experts` listed them.
        store: holds the experts of all *layers*.
        slots, expert_memory, policy, policy_options, link, miss, miss_threads, device: as for
            `attach`.
        at_detach: called once the model has its weights again, to close what *store* reads from.

    Raises:
        BudgetError, AttachError, MelinoeError: as `attach`; the model is as before.
    """
    check_miss(miss, miss_threads)
    count, make, target = checked_settings(
        model, layers, slots, expert_memory, policy, policy_options, link, device
    )
    misses = _misses(miss, layers, store, target, link, miss_threads)
    return Handle(model, layers, store, count, make, link, target, at_detach, misses)


def _misses(
    miss: str | Misses,
    layers: Sequence[ExpertsLayer],
    store: Store,
    device: torch.device,
    link: EmulatedLink | None,
    threads: int | None,
) -> Misses:
    if isinstance(miss, Misses):
        return miss
    return measure_misses(miss, layers, store, device, link, threads)


def checked_settings(
    model: nn.Module,
    layers: Sequence[ExpertsLayer],
    slots: int | Sequence[int] | None,
    expert_memory: str | int | None,
    policy: str | Callable[[], Policy],
    policy_options: Mapping[str, Any] | None,
    link: EmulatedLink | None,
    device: torch.device | str | None,
) -> tuple[int | tuple[int, ...], Sequence[Callable[[], Policy]], torch.device]:
    """Check all that can be checked before anything is moved; slots and policies by layer."""
    if any(bound(layer.module) is not None for layer in layers):
        raise AttachError("a runtime is attached to this model already; detach() it first")
    if (slots is None) == (expert_memory is None):
        raise BudgetError(
            "give either slots (experts per layer) or expert_memory (such as 8GiB), and not both"
        )
    if slots is None:
        assert expert_memory is not None
        slots = slots_for(expert_memory, layers)
    by_layer = slots_by_layer(slots, layers)  # refuses what cannot be
    target = torch.device(device) if device is not None else _device(model, layers)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    if target.type == "cpu":
        target = torch.device("cpu")  # tensors say "cpu" also where "cpu:0" was asked for
    check_link(target, link)
    makers = _policy_makers(policy, dict(policy_options or {}), len(layers))
    for make in makers:
        make()  # an unknown policy or option shows here
    return slots if isinstance(slots, int) else by_layer, makers, target


def _policy_makers(
    policy: str | Callable[[], Policy], options: dict[str, Any], num_layers: int
) -> Sequence[Callable[[], Policy]]:
    if isinstance(policy, str):
        return policy_makers(policy, options, num_layers)
    if options:
        raise ValueError("policy_options belong to a policy given by name")
    return [policy] * num_layers


def _check_in_memory(layers: Sequence[ExpertsLayer], store: str) -> None:
    """The weights are here to be moved, and the store is one that takes them."""
    if store not in _STORES:
        raise AttachError(
            f"there is no store {store!r} for a model in memory; choose ram or pinned, or load the "
            "checkpoint with melinoe.load, which also knows disk"
        )
    for layer in layers:
        if any(p.is_meta for p in layer.module.parameters(recurse=False)):
            raise AttachError(
                f"the experts of {layer.name} are not in memory (they are on the meta device); "
                "load the model without device_map, or with melinoe.load"
            )


def _check_fits(layers: Sequence[ExpertsLayer], store: Store) -> None:
    """
    The store can be read, has as many layers and experts as the model, and holds the same ones.

    Of each layer the last expert's bits are compared: the model's own weights are given up for
    the store's, so a store that was never filled would be their end.
    """
    if getattr(store, "closed", False):
        raise AttachError(
            "the store is closed, because the runtime that it was opened for was detached; load "
            "the checkpoint again, or attach with store='ram'"
        )
    has = [(store.num_experts(n), store.block_bytes(n)) for n in range(store.num_layers)]
    same = has == [(layer.num_experts, layer.block_bytes) for layer in layers]
    if not (same and all(_holds_last_of(layer, store) for layer in layers)):
        raise AttachError(
            "the store holds other experts than this model's; give the store that was filled from "
            "this model"
        )


def _holds_last_of(layer: ExpertsLayer, store: Store) -> bool:
    """Whether the last expert of *layer* is the store's bit for bit, or only the store has it."""
    parameters = {t.name: layer.module.get_parameter(t.name) for t in layer.tensors}
    if any(parameter.is_meta for parameter in parameters.values()):
        return True
    own = {name: p.detach()[-1].cpu().contiguous() for name, p in parameters.items()}
    kept = {name: torch.empty_like(tensor) for name, tensor in own.items()}
    store.read(layer.index, layer.num_experts - 1, kept)
    return all(torch.equal(_bits(own[name]), _bits(kept[name])) for name in own)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _device(model: nn.Module, layers: Sequence[ExpertsLayer]) -> torch.device:
    """Where the model's other weights are."""
    stacked = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in stacked and not parameter.is_meta:
            return parameter.device
    return torch.device("cpu")
