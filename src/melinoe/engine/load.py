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

from melinoe.cache.policy import Policy
from melinoe.cache.residency import StreamedPrefill
from melinoe.checkpoint.backbone import layers_of, load_backbone
from melinoe.checkpoint.opening import Checkpoint, build_on_meta, open_checkpoint
from melinoe.engine.budget import (
    Cap,
    GpuBudget,
    backbone_bytes,
    cache_bytes,
    share_budget,
    workspace_bytes,
)
from melinoe.engine.checks import same_bits
from melinoe.engine.device.static_cache import cache_length
from melinoe.engine.handle import Engine, Handle
from melinoe.engine.misses import Misses, measure_misses
from melinoe.engine.options import STAGING_EXPERTS, Options
from melinoe.engine.placement import Model, Placement, in_slots, place, use_graphs
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
from melinoe.experts.format import ExpertFormat
from melinoe.experts.formats import named_format
from melinoe.moe.dispatch import bound
from melinoe.moe.experts import ExpertsLayer, find_experts, without_wrapper
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
    policy: str | Callable[[], Policy] = "lru",
    policy_options: Mapping[str, Any] | None = None,
    engine: str = "auto",
    store: str | Store = "auto",
    format: str | None = None,
    miss: str | Misses = "wait",
    miss_threads: int | None = None,
    admit: int | None = None,
    staging_experts: int = STAGING_EXPERTS,
    graphs: bool | None = None,
    compile: bool | None = None,
    link: EmulatedLink | None = None,
) -> tuple[Any, Handle]:
    """
    Load a checkpoint and serve it with few resident experts.

    Say what you have, and get the best that runs there: ``melinoe.load("org/model")`` takes a GPU
    if there is one and as many slots as fit; *gpu_memory* and *ram* set limits. One line in the log
    (``handle.placement``) says what was chosen and why.

    Experts go straight from the files to where they stay. Host memory peaks near the experts' bytes
    plus the backbone with a store in RAM, and near the slots plus the backbone with the store on
    disk (`benchmarks/load_memory.py`).

    Args:
        name: A directory in the hub's layout, or the name of a repository on the hub.
        device: ``cpu``, ``cuda`` or ``cuda:1``; absent: CUDA if there is one, else the CPU.
        gpu_memory: Limit on everything that PyTorch allocates on the GPU, such as ``"8GiB"``, kept
            until `Handle.detach`.
        ram: Limit on host memory for experts, such as ``"32GiB"``: they wait in RAM if they fit,
            else on disk.
        batch: Sequences at once that the GPU's memory is to hold; absent: 1.
        context: Tokens of a sequence that it is to hold; absent: 2,048.
        dtype: Type of all weights; ``auto`` takes the checkpoint's.
        slots: Experts of each layer to keep in slots, 1 to all; or a number for each layer, as
            `melinoe.cache.allocate` makes them. Absent: as many as fit.
        expert_memory: Instead of *slots*: memory of the slots of all layers; never exceeded.
        policy: Name of a cache policy, or a function that makes one for each layer.
        policy_options: What the named policy takes, such as ``{"gamma": 0.9}`` for ``lfu``.
        engine: Who decides what is loaded. ``reference``: the host, in every layer; runs
            everywhere. ``fast``: the GPU, so that a decode step never asks the host; needs LRU or
            LFU and host memory that can be pinned for all experts. ``auto``: ``fast`` where it can
            run.
        store: Where experts wait: ``ram``, ``pinned`` (for a GPU), ``disk``; ``auto``: the fastest
            that has the room. Or a store that holds this checkpoint's experts already.
        format: How experts are stored: ``plain``, in 16 or 32 bits; ``int8``, ``int4``, ``mxfp4``
            or ``fp8``, packed while loading, which changes what the model says; absent: as the
            checkpoint has them. Slots hold them so and compute from them, except those of the fast
            engine, which unpacks int8 and int4 as `melinoe pack` writes them while it copies, and
            takes no other. On the CPU a token's last bits depend on whether 8 or more tokens of a
            pass share its expert: fewer are computed in float32.
        miss: ``wait`` for the expert to come; ``cpu``: the host computes it where it is, and
            nothing is loaded on demand, so that slots hold what prefetches bring; ``split``: by
            cost, which is measured now. Or another handle's ``misses``, to decide by its figures.
        miss_threads: Threads of the host while it computes misses; absent: measured now.
        admit: Experts of a prompt that may evict others, with the fast engine; absent: no limit.
        staging_experts: Experts that one of the two staging blocks of the fast engine holds.
        graphs: Replay decode steps from CUDA graphs; absent: where there is CUDA.
        compile: Capture decode steps of fewer kernels, made by ``torch.compile``. The first steps
            of a batch size and cache length take as long as compiling does, and fused kernels round
            otherwise: the last bits of logits change.
        link: Emulate a slow link; on the CPU only.

    Returns:
        The transformers model, in evaluation mode, on which ``generate`` works as always; and the
        handle with counters, prefetch and record. The tokenizer is the caller's to load.

    Raises:
        CheckpointError: Files missing, torn, packed in a way that is not read, or of another model
            than the config's.
        UnsupportedModelError: The family has no experts that can be served.
        BudgetError: Too little memory; two options that say how much is resident.
        AttachError: An unknown word; a device that is not there; an engine that cannot run.
    """
    options = _options(locals(), but="name")
    with ExitStack() as on_failure:
        checkpoint = open_checkpoint(str(name), options.dtype)
        on_failure.callback(checkpoint.close)

        own = [source.format for source in checkpoint.experts]
        layers = _stored(checkpoint.layers, options, own)
        packs = _packs(layers, own)

        def budget(total: int, staging: int) -> GpuBudget:
            return _share_out(checkpoint, layers, options, total, staging)

        if not isinstance(options.store, str):
            stored = DiskStore(checkpoint, layers)
            for layer in layers:
                last = read_block(layer, stored, layer.num_experts - 1)
                if not _holds(layer, options.store, last):
                    raise AttachError(
                        "the store holds other experts than this checkpoint's; leave store out"
                    )

        facts = Model(layers, checkpoint.backbone_bytes, packs=packs, budget=budget)

        def serve(chosen: Placement) -> tuple[Any, Handle]:
            return _load(checkpoint, layers, options, chosen)

        model, handle = _best(options, facts, serve)
        if handle.store.kind == "disk" and isinstance(options.store, str):
            on_failure.pop_all()  # the store reads on, until the model is detached
    return model, handle


def attach(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    slots: int | Sequence[int] | None = None,
    expert_memory: str | int | None = None,
    policy: str | Callable[[], Policy] = "lru",
    policy_options: Mapping[str, Any] | None = None,
    engine: str = "auto",
    store: str | Store = "auto",
    format: str | None = None,
    miss: str | Misses = "wait",
    miss_threads: int | None = None,
    admit: int | None = None,
    staging_experts: int = STAGING_EXPERTS,
    graphs: bool | None = None,
    compile: bool | None = None,
    link: EmulatedLink | None = None,
) -> Handle:
    """
    Serve a model that is in memory with few resident experts.

    The stacked weights are moved into the store and freed; the model computes the same as before,
    ``generate`` included, without gradients. It cannot be saved, moved or cast until
    `Handle.detach`.

    Args:
        model: A transformers model of a decorated family, or PEFT's model around one, with adapters
            on any module but the experts.
        device: Where the slots are; absent: where the rest of the model is.
        slots, expert_memory, policy, policy_options, engine, store, format, miss,
            miss_threads, admit, staging_experts, graphs, compile, link: As for `load`; the store is
            in host memory.

    Raises:
        UnsupportedModelError: The model's family or layout cannot be served.
        BudgetError: Too little memory; two options that say how much is resident.
        AttachError: Attached already; weights that are not in memory; a store of another model; an
            unknown word; an engine that cannot run. The model is as before.
    """
    options = _options(locals(), but="model")
    model = without_wrapper(model)
    layers = find_experts(model)
    if any(bound(layer.module) is not None for layer in layers):
        raise AttachError("Melinoe is attached to this model already; call handle.detach() first")
    if isinstance(options.store, str):
        _check_in_memory(layers)
    own = [layer.format for layer in layers]
    layers = _stored(layers, options, own)

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
                if not is_freed(layer):
                    continue
                if weights:
                    put_weights(layer, weights)
                else:
                    give_weights_back(layer, filled)
            raise

    facts = Model(
        layers, in_memory=True, device=_home(model, layers), packs=_packs(layers, own),
        experts_on_host=all(weights.device.type == "cpu" for layer in layers
                            for weights in weights_of(layer).values()),
    )  # fmt: skip
    return _best(options, facts, serve)


def _options(given: dict[str, Any], but: str) -> Options:
    return Options(**{name: value for name, value in given.items() if name != but})


def _best(options: Options, model: Model, serve: Callable[[Placement], Any]) -> Any:
    """Serve as was chosen; by the host if the device turns out not to be able to."""
    chosen, reason = place(options, model), None
    try:
        made = serve(chosen)
    except (MelinoeError, RuntimeError) as error:
        if options.engine != "auto" or chosen.engine != "fast" or not _host_may(error):
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


def _host_may(error: Exception) -> bool:
    """Whether the reference engine may do what the fast one could not."""
    if isinstance(error, BudgetError):
        return isinstance(error, PinError)
    refused = CheckpointError | UnsupportedModelError | torch.OutOfMemoryError
    return not isinstance(error, refused)


def _load(
    checkpoint: Checkpoint,
    stored: Sequence[ExpertsLayer],
    options: Options,
    chosen: Placement,
) -> tuple[Any, Handle]:
    model = load_backbone(checkpoint, chosen.device)
    layers = [
        layer.stored_as(as_stored.format)
        for layer, as_stored in zip(layers_of(checkpoint, model), stored, strict=True)
    ]
    cap: Cap | None = None
    with ExitStack() as on_failure:
        if chosen.budget is not None:
            cap = Cap(chosen.budget.total, chosen.device)
            on_failure.callback(cap.lift)
            cap.put()
        filled: Any = options.store
        if isinstance(filled, str):
            filled = _fill(checkpoint, layers, chosen)
        closes = chosen.store == "disk" and isinstance(options.store, str)
        handle = _handle(
            model, layers, filled, options, chosen, cap, checkpoint.close if closes else None
        )
        on_failure.pop_all()  # the handle lifts it now
    return model, handle


def _handle(
    model: nn.Module,
    layers: Sequence[ExpertsLayer],
    store: Store,
    options: Options,
    chosen: Placement,
    cap: Cap | None = None,
    at_detach: Callable[[], None] | None = None,
) -> Handle:
    device, slots = chosen.device, chosen.slots
    layers = in_slots(layers, chosen.engine)
    misses = options.miss
    if not isinstance(misses, Misses):
        misses = measure_misses(misses, layers, store, device, options.link, options.miss_threads)
    engine: Engine
    if chosen.engine == "fast":
        from melinoe.engine.device.engine import DeviceEngine  # Triton may be absent

        engine = DeviceEngine(
            model, layers, store, slots, chosen.policies, device,  # type: ignore[arg-type]
            prefill=StreamedPrefill(options.admit), staging_experts=options.staging_experts,
            use_graphs=use_graphs(options, device), compile=bool(options.compile),
        )  # fmt: skip
    else:
        engine = ReferenceEngine(
            model, layers, store, slots, chosen.policies, device, options.link, misses
        )
    return Handle(
        model, layers, store, engine, device, slots=slots, misses=misses, link=options.link,
        budget=chosen.budget, cap=cap, at_detach=at_detach, placement=chosen.describe(layers),
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
    context = cache_length(options.context or 2048, bool(options.compile))
    config = copy.deepcopy(checkpoint.config)
    hollow = build_on_meta(checkpoint.model_class, config, checkpoint.dtype)
    layers = find_experts(hollow)
    if not staging:  # slots hold what the store does
        layers = [layer.stored_as(kept.format) for layer, kept in zip(layers, stored, strict=True)]
    asked = hollow, layers, batch, context
    return share_budget(
        total, layers, backbone_bytes(hollow, layers), cache_bytes(*asked), workspace_bytes(*asked),
        batch=batch, context=context, staging_experts=staging,
    )  # fmt: skip


# --- stores -------------------------------------------------------------------------------------


def _stored(
    layers: Sequence[ExpertsLayer], options: Options, own: Sequence[ExpertFormat]
) -> list[ExpertsLayer]:
    """
    Give *layers* in the format that experts are to be stored in.

    Args:
        layers: Of the model.
        options: What the user said.
        own: The format that each layer's experts have now.

    Raises:
        UnsupportedModelError: The format cannot hold experts of this shape.
        AttachError: A store was given that does not hold these experts, or not in this format.
    """
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
    if not isinstance(options.store, str):
        _check_holds(found, options.store)
    return found


def _packs(layers: Sequence[ExpertsLayer], own: Sequence[ExpertFormat]) -> bool:
    """Whether experts of the format *own* are packed to be stored as *layers* say."""
    return any(
        not layer.format.exact and layer.format != has
        for layer, has in zip(layers, own, strict=True)
    )


def _fill(checkpoint: Checkpoint, layers: Sequence[ExpertsLayer], chosen: Placement) -> Store:
    """A store with all experts in it; the disk's has them already."""
    disk = DiskStore(checkpoint, layers)
    if chosen.store == "disk":
        return disk
    store = (PinnedStore if chosen.store == "pinned" else RamStore)(layers)

    def fill(place: tuple[int, int]) -> None:
        disk.read(*place, store.views(*place))

    places = [(layer.index, expert) for layer in layers for expert in range(layer.num_experts)]
    with ThreadPoolExecutor(_READERS, thread_name_prefix="melinoe-fill") as pool:
        for _ in tqdm(pool.map(fill, places), total=len(places), desc="Loading experts"):
            pass
    return store


def _check_in_memory(layers: Sequence[ExpertsLayer]) -> None:
    for layer in layers:
        if any(p.is_meta for p in layer.module.parameters(recurse=False)):
            raise AttachError(
                f"the experts of {layer.name} are not in memory (they are on the meta device); "
                "load the model without device_map, or with melinoe.load"
            )


def _check_holds(layers: Sequence[ExpertsLayer], store: Store) -> None:
    """
    The store can be read, has as many layers and experts as the model, and holds the same ones.

    Of each layer the last expert's bits are compared: the model's own weights are given up for
    the store's, so a store that was never filled would be their end.
    """
    if getattr(store, "closed", False):
        raise AttachError(
            "the store is closed, because the handle that it was opened for was detached; load "
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
    parameters = weights_of(layer)
    if any(parameter.is_meta for parameter in parameters.values()):
        return True
    last = {name: p.detach()[-1].cpu().contiguous() for name, p in parameters.items()}
    own = layer.format.encode(layer.tensors, last)
    return _holds(layer, store, own)


def _holds(layer: ExpertsLayer, store: Store, last: Mapping[str, Tensor]) -> bool:
    """Whether the last expert of *layer* that *store* holds is *last*, bit for bit."""
    kept = read_block(layer, store, layer.num_experts - 1)
    return all(same_bits(part, kept[name]) for name, part in last.items())


def _home(model: nn.Module, layers: Sequence[ExpertsLayer]) -> torch.device:
    """The device of the model's other weights."""
    stacked = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in stacked and not parameter.is_meta:
            return parameter.device
    return torch.device("cpu")
