"""Serve a model with few resident experts: from a checkpoint, or one that is in memory."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from melinoe.cache import DEFAULT_POLICY
from melinoe.cache.policy import Policy
from melinoe.cache.residency import StreamedPrefill
from melinoe.checkpoint.backbone import layers_of, load_backbone
from melinoe.checkpoint.opening import Checkpoint, build_on_meta, open_checkpoint
from melinoe.engine.budget import (
    GpuBudget,
    backbone_bytes,
    cap_memory,
    memory_of,
    prompt_bytes,
    share_budget,
)
from melinoe.engine.checks import same_bits
from melinoe.engine.handle import Handle
from melinoe.engine.misses import Misses, measure_misses
from melinoe.engine.options import STAGING_EXPERTS, Options
from melinoe.engine.placement import Model, Placement, place
from melinoe.engine.reference import ReferenceEngine
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import (
    AttachError,
    BudgetError,
    CheckpointError,
    MelinoeError,
    PinError,
    UnsupportedModelError,
)
from melinoe.experts.format import ExpertFormat, PackedFormat
from melinoe.experts.formats import named_format
from melinoe.host_memory import free_host_bytes
from melinoe.moe.dispatch import bound
from melinoe.moe.experts import ExpertsLayer, find_experts, without_wrapper
from melinoe.moe.packed_backbone import pack_backbone
from melinoe.stores.disk_store import DiskStore
from melinoe.stores.ram_store import PinnedStore, RamStore
from melinoe.stores.store import Store, read_block
from melinoe.stores.weights import give_weights_back, is_freed, put_weights, weights_of

_log = logging.getLogger("melinoe")

# Reading is bound by the disk; more readers than this gained nothing.
_READERS = 4


def load(
    name: str | Path,
    device: torch.device | str | None = None,
    *,
    gpu_memory: str | int | None = None,
    ram: str | int | None = None,
    batch: int | None = None,
    context: int | None = None,
    dtype: torch.dtype | str = "auto",
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = DEFAULT_POLICY,
    policy_options: Mapping[str, Any] | None = None,
    engine: str = "auto",
    store: str | Store = "auto",
    format: str | None = None,
    backbone: str = "plain",
    miss: str | Misses = "wait",
    graphs: bool | None = None,
    link: EmulatedLink | None = None,
) -> tuple[Any, Handle]:
    """
    Load a checkpoint and serve it with few resident experts.

    Say what you have, and get the best that runs there: a GPU if there is one and as many slots as
    fit; *gpu_memory* and *ram* set limits. ``handle.placement``, in the log too, says what was
    chosen and why. Host memory peaks near the experts' bytes plus the backbone with a store in RAM,
    and near the slots plus the backbone with the store on disk.

    Args:
        name: A directory in the hub's layout, or the name of a repository on the hub.
        policy: Or a function that makes one for each layer.
        store: Or a store that holds this checkpoint's experts already.
        miss: Or another handle's ``misses``, to decide by its figures.
        All others: As `melinoe.engine.options.Options` says of each.

    Returns:
        The transformers model, on which ``generate`` works as always, and the handle.

    Raises:
        CheckpointError: Files missing, torn, packed in a way that is not read, or of another model.
        UnsupportedModelError: The family has no experts that can be served.
        BudgetError: Too little memory; two options that say how much is resident.
        AttachError: An unknown word; a device that is not there; an engine that cannot run.
    """
    options = Options(**{key: value for key, value in locals().items() if key != "name"})
    with ExitStack() as on_failure:
        checkpoint = open_checkpoint(str(name), options.dtype)
        on_failure.callback(checkpoint.close)
        own = [source.format for source in checkpoint.experts]
        layers = _stored(checkpoint.layers, options, own)
        if not isinstance(options.store, str):
            files = DiskStore(checkpoint, layers)
            _check_store(
                layers, options.store, lambda one: read_block(one, files, one.num_experts - 1)
            )

        def budget(total: int, staging: int) -> GpuBudget:
            return _share_out(checkpoint, layers, options, total, staging)

        facts = Model(layers, checkpoint.backbone_bytes, packs=_packs(layers, own), budget=budget)
        model, handle = _best(
            options, facts, lambda chosen: _load(checkpoint, layers, options, chosen)
        )
        if handle.store.kind == "disk" and isinstance(options.store, str):
            on_failure.pop_all()  # the store reads on, until the model is detached
    return model, handle


def attach(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = DEFAULT_POLICY,
    policy_options: Mapping[str, Any] | None = None,
    engine: str = "auto",
    store: str | Store = "auto",
    format: str | None = None,
    miss: str | Misses = "wait",
    graphs: bool | None = None,
    link: EmulatedLink | None = None,
) -> Handle:
    """
    Serve a model that is in memory with few resident experts.

    The stacked weights are moved into the store and freed; the model computes the same as before,
    without gradients. It cannot be saved, moved or cast until `Handle.detach`.

    Args:
        model: A transformers model of a decorated family, or PEFT's model around one, with adapters
            on any module but the experts.
        device: Where the slots are; absent: where the rest of the model is.
        All others: As for `load`; the store is in host memory.

    Raises:
        UnsupportedModelError, BudgetError: As `load`.
        AttachError: Also attached already; weights that are not in memory; a store of another
            model. The model is as before.
    """
    options = Options(**{key: value for key, value in locals().items() if key != "model"})
    model = without_wrapper(model)
    layers = find_experts(model)
    for layer in layers:
        if bound(layer.module) is not None:
            raise AttachError(
                "Melinoe is attached to this model already; call handle.detach() first"
            )
        if isinstance(options.store, str) and any(p.is_meta for p in weights_of(layer).values()):
            raise AttachError(
                f"the experts of {layer.name} are not in memory (they are on the meta device); "
                "load the model without device_map, or with melinoe.load"
            )
    own = [layer.format for layer in layers]
    layers = _stored(layers, options, own)
    if not isinstance(options.store, str):
        _check_store(layers, options.store, _own_last)

    def serve(chosen: Placement) -> Handle:
        # Kept until all went well: from a packed store they would come back rounded.
        kept = [
            {} if layer.format.exact else {n: p.detach() for n, p in weights_of(layer).items()}
            for layer in layers
        ]
        filled = options.store
        if isinstance(filled, str):
            filled = (PinnedStore if chosen.store == "pinned" else RamStore).from_modules(layers)
        try:
            return _handle(model, layers, filled, options, chosen)
        except BaseException:
            for layer, weights in zip(layers, kept, strict=True):
                if is_freed(layer) and weights:
                    put_weights(layer, weights)
                elif is_freed(layer):
                    give_weights_back(layer, filled)
            raise

    weights = [one for layer in layers for one in weights_of(layer).values()]
    stacked = {id(one) for one in weights}
    others = [p for p in model.parameters() if id(p) not in stacked and not p.is_meta]
    facts = Model(
        layers, in_memory=True, device=others[0].device if others else torch.device("cpu"),
        packs=_packs(layers, own), experts_on_host=all(w.device.type == "cpu" for w in weights),
    )  # fmt: skip
    return _best(options, facts, serve)


def _best(options: Options, model: Model, serve: Callable[[Placement], Any]) -> Any:
    """Serve as was chosen; by the host if the device turns out not to be able to."""
    chosen, reason = place(options, model), None
    try:
        made = serve(chosen)
    except (MelinoeError, RuntimeError) as error:
        hopeless: Any = CheckpointError | UnsupportedModelError | torch.OutOfMemoryError
        if isinstance(error, BudgetError) and not isinstance(error, PinError):
            hopeless = BudgetError
        if options.engine != "auto" or chosen.engine != "fast" or isinstance(error, hopeless):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason is not None:  # after the except block: the error's frames hold the first try's memory
        gc.collect()
        if chosen.device.type == "cuda":
            torch.cuda.empty_cache()
        chosen = place(options, model, host_because=reason)
        made = serve(chosen)
    # The slower way on a GPU is said loudly.
    slower = chosen.device.type == "cuda" and chosen.engine != "fast" and options.engine == "auto"
    _log.log(logging.WARNING if slower else logging.INFO, chosen.describe(model.layers))
    return made


def _load(
    checkpoint: Checkpoint, stored: Sequence[ExpertsLayer], options: Options, chosen: Placement
) -> tuple[Any, Handle]:
    model = load_backbone(checkpoint, chosen.device)
    if options.backbone != "plain":
        kind = named_format(options.backbone)
        assert isinstance(kind, PackedFormat)
        pack_backbone(model, kind)
    layers = [
        layer.stored_as(as_stored.format)
        for layer, as_stored in zip(layers_of(checkpoint, model), stored, strict=True)
    ]
    with ExitStack() as on_failure:
        budget = chosen.budget
        lift = cap_memory(budget.total, chosen.device) if budget is not None else None
        if lift is not None:
            on_failure.callback(lift)
        filled: Any = options.store
        closes = None
        if isinstance(filled, str):
            filled = _fill(checkpoint, layers, chosen)
            closes = checkpoint.close if chosen.store == "disk" else None
        handle = _handle(model, layers, filled, options, chosen, lift, closes)
        on_failure.pop_all()  # the handle lifts it now
    return model, handle


def _handle(
    model: nn.Module,
    layers: Sequence[ExpertsLayer],
    store: Store,
    options: Options,
    chosen: Placement,
    lift_cap: Callable[[], None] | None = None,
    at_detach: Callable[[], None] | None = None,
) -> Handle:
    device, slots = chosen.device, chosen.slots
    misses = options.miss
    if not isinstance(misses, Misses):
        misses = measure_misses(misses, layers, store, device, options.link)
    engine: Any
    if chosen.engine == "fast":
        from melinoe.engine.device.engine import DeviceEngine  # Triton may be absent

        engine = DeviceEngine(
            model, layers, store, slots, chosen.policies, device,
            prefill=StreamedPrefill(), staging_experts=STAGING_EXPERTS,
            use_graphs=device.type == "cuda" if options.graphs is None else options.graphs,
        )  # fmt: skip
    else:
        engine = ReferenceEngine(
            model, layers, store, slots, chosen.policies, device, options.link, misses
        )
    return Handle(
        model, layers, store, engine, device, slots=slots, misses=misses, link=options.link,
        budget=chosen.budget, lift_cap=lift_cap, at_detach=at_detach,
        placement=chosen.describe(layers),
    )  # fmt: skip


def _share_out(
    checkpoint: Checkpoint,
    stored: Sequence[ExpertsLayer],
    options: Options,
    total: int,
    staging: int,
) -> GpuBudget:
    """Share *total* bytes of a GPU out, as a model without weights tells what it needs."""
    batch = options.batch or 1
    context = options.context or 2048
    config = copy.deepcopy(checkpoint.config)
    hollow = build_on_meta(checkpoint.model_class, config, checkpoint.dtype)
    layers = find_experts(hollow)
    layers = [layer.stored_as(kept.format) for layer, kept in zip(layers, stored, strict=True)]
    return share_budget(
        total, layers, backbone_bytes(hollow, layers),
        *prompt_bytes(hollow, layers, batch, context),
        batch=batch, context=context, staging_experts=staging,
    )  # fmt: skip


# --- stores -------------------------------------------------------------------------------------


def _stored(
    layers: Sequence[ExpertsLayer], options: Options, own: Sequence[ExpertFormat]
) -> list[ExpertsLayer]:
    """Give *layers*, whose experts are *own* now, in the format that they are to be stored in."""
    formats = list(own)
    if options.format is not None:
        asked = named_format(options.format)
        # Codes of that name, in whatever groups, stay as they are: rounding again would only lose.
        formats = [
            has if asked.name in (has.name, has.name.split("-")[0]) else asked for has in own
        ]
    if not isinstance(options.store, str):
        if options.store.num_layers == len(layers):
            formats = [options.store.format(layer.index) for layer in layers]
        if options.format is not None and formats[0].name != options.format:
            raise AttachError(
                f"the store holds experts as {formats[0].name}, not as {options.format}; leave "
                "format out"
            )
    found = [layer.stored_as(kind) for layer, kind in zip(layers, formats, strict=True)]
    for layer in found:
        layer.format.parts(layer.tensors)  # a shape that cannot be packed shows here
    return found


def _packs(layers: Sequence[ExpertsLayer], own: Sequence[ExpertFormat]) -> bool:
    """Whether experts of the format *own* are packed to be stored as *layers* say."""
    both = zip(layers, own, strict=True)
    return any(not layer.format.exact and layer.format != has for layer, has in both)


def _fill(checkpoint: Checkpoint, layers: Sequence[ExpertsLayer], chosen: Placement) -> Store:
    """A store with all experts in it; the disk's has them already."""
    direct = None
    if chosen.store == "disk" and chosen.device.type == "cpu":  # slots take of the same memory
        free = free_host_bytes()
        taken = memory_of(chosen.slots, layers)
        direct = free is not None and checkpoint.expert_bytes > free - taken
    disk = DiskStore(checkpoint, layers, direct)
    if chosen.store == "disk":
        return disk
    store = (PinnedStore if chosen.store == "pinned" else RamStore)(layers)
    places = [(layer.index, expert) for layer in layers for expert in range(layer.num_experts)]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="melinoe-fill") as pool:
        filled = pool.map(lambda at: disk.read(at[0], at[1], store.views(*at)), places)
        for _ in tqdm(filled, total=len(places), desc="Loading experts"):
            pass
    return store


def _check_store(
    layers: Sequence[ExpertsLayer],
    store: Store,
    last_of: Callable[[ExpertsLayer], Mapping[str, Tensor] | None],
) -> None:
    """Refuse a store that cannot be read, or whose last experts are not *last_of* the layers."""
    if getattr(store, "closed", False):
        raise AttachError(
            "the store is closed, because the handle that it was opened for was detached; load "
            "the checkpoint again, or attach with store='ram'"
        )
    has = [(store.num_experts(n), store.block_bytes(n)) for n in range(store.num_layers)]
    same = has == [(layer.num_experts, layer.block_bytes) for layer in layers]
    for layer in layers if same else ():
        kept = read_block(layer, store, layer.num_experts - 1)
        own = last_of(layer) or kept
        same = same and all(same_bits(part, kept[name]) for name, part in own.items())
    if not same:
        raise AttachError(
            "the store holds other experts than this model's; leave store out, or give the store "
            "that was filled from this model"
        )


def _own_last(layer: ExpertsLayer) -> dict[str, Tensor] | None:
    """The block of the last expert that is in the module of *layer*; None if none is."""
    parameters = weights_of(layer)
    if any(parameter.is_meta for parameter in parameters.values()):
        return None
    last = {name: p.detach()[-1].cpu().contiguous() for name, p in parameters.items()}
    return layer.format.encode(layer.tensors, last)
