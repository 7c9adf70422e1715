"""Choose what serves a model best on this machine: device, who decides, store and slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from melinoe.cache.packing import PACKABLE
from melinoe.cache.policy import Policy, policy_makers
from melinoe.engine.budget import GpuBudget, memory_of, slots_by_layer, slots_for
from melinoe.engine.device.support import why_not
from melinoe.engine.options import STAGING_EXPERTS, Options
from melinoe.engine.transfer import read_by_threads, staging_blocks
from melinoe.errors import AttachError, BudgetError, UnknownNeedError
from melinoe.host_memory import (
    check_host_room,
    format_bytes,
    free_host_bytes,
    host_memory,
    parse_bytes,
)
from melinoe.moe.experts import ExpertsLayer

# Of the memory that is free, what is taken where nobody says how much: the rest is for the system
# and for what a prompt needs while it runs.
_SHARE = 0.8
_WHERE = {
    "ram": "all experts wait in host memory",
    "pinned": "all experts wait in pinned host memory",
    "disk": "experts are read from disk",
}


@dataclass(frozen=True)
class Model:
    """Facts of a model, known before it is loaded."""

    layers: Sequence[ExpertsLayer]  # in the format of the store; weights are not read
    backbone_bytes: int = 0  # of all other weights that loading will add
    in_memory: bool = False  # whether there is no file to read experts from
    device: torch.device | None = None  # where its other weights are; None for a checkpoint
    # Shares so many bytes of a GPU out, with so many experts in a staging block.
    budget: Callable[[int, int], GpuBudget] | None = None
    packs: bool = False  # whether experts are packed as they are read, to be kept in memory
    experts_on_host: bool = True  # whether experts in memory are in the host's

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.num_experts * layer.block_bytes for layer in self.layers)

    def added_bytes(self, options: Options) -> int:
        """Bytes of host memory that a store with all experts in it would add."""
        # Experts in host memory move into the store layer by layer, unless they are packed.
        moves = self.in_memory and not self.packs and self.experts_on_host
        return 0 if moves or not isinstance(options.store, str) else self.expert_bytes


@dataclass(frozen=True)
class Placement:
    """The choice that was made."""

    device: torch.device  # of the slots, and of all other weights
    engine: str  # "fast": the device decides; "reference": the host does
    store: str  # "ram", "pinned" or "disk"
    slots: tuple[int, ...]  # of each layer
    policies: Sequence[Callable[[], Policy]]  # by layer
    budget: GpuBudget | None  # the limit on the GPU's memory, shared out, if one was given
    why: tuple[str, str]  # in words: why the host decides; what the slots fit into

    def describe(self, layers: Sequence[ExpertsLayer]) -> str:
        """One line for the log."""
        least, most = min(self.slots), max(self.slots)
        slots = str(most) if least == most else f"{least} to {most}"
        who = "the GPU decides what is loaded" if self.engine == "fast" else "the host decides"
        reason, room = (f" ({one})" if one else "" for one in self.why)
        size = format_bytes(memory_of(self.slots, layers))
        return (
            f"served on {self.device}: {who}{reason}; slots for {slots} of "
            f"{max(layer.num_experts for layer in layers)} experts of each layer, {size}{room}; "
            f"{_WHERE[self.store]}"
        )


def place(options: Options, model: Model, host_because: str | None = None) -> Placement:
    """
    Choose, and refuse what cannot work, before anything is read or moved; *host_because* says why
    the host must decide. AttachError: the device is not there, or what was asked for cannot work.
    BudgetError: too little memory. MelinoeError: no such policy.
    """
    if options.slots is not None:
        slots_by_layer(options.slots, model.layers)
    device = _device(options.device, model.device)
    if options.link is not None and device.type != "cpu":
        raise AttachError(
            f"the emulated link works on the CPU only, and the slots are on {device}; "
            "leave the link out to use the real one"
        )
    if options.backbone != "plain" and device.type != "cpu":
        raise AttachError(
            f"the backbone is packed on the CPU alone, and the model runs on {device}; leave "
            'backbone out, or give device="cpu"'
        )
    if not isinstance(options.policy, str) and options.policy_options:
        raise ValueError("policy_options belong to a policy given by name")
    policies: Sequence[Callable[[], Policy]] = (
        policy_makers(options.policy, dict(options.policy_options or {}), len(model.layers))
        if isinstance(options.policy, str)
        else [options.policy] * len(model.layers)
    )
    names = {make().name for make in policies}  # an unknown policy or option shows here
    free = free_host_bytes()
    room = None if free is None else int(_SHARE * free)
    if options.ram is not None:
        room = parse_bytes(options.ram)
    why = host_because or _why_host(options, device, names, model, room)
    engine = "fast" if why is None else "reference"
    if why and options.engine == "fast":
        raise AttachError(
            f'the device engine cannot run here: {why}; leave engine out, or give "reference"'
        )
    if engine != "fast" and (name := options.needs_device) is not None:
        raise AttachError(
            f"{name} needs the device engine, which cannot run here: {why}; leave {name} out"
        )
    store = _store(options, device, engine, model, room)
    slots, budget, into = _slots(options, device, engine, store, model, room)
    by_layer = slots_by_layer(slots, model.layers)
    _check_host(options, device, store, by_layer, model)
    return Placement(device, engine, store, by_layer, policies, budget, (why or "", into))


def _device(asked: Any, home: torch.device | None) -> torch.device:
    """The device, if it is there, written as tensors write it."""
    if asked is None:
        asked = home or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise AttachError(f"there is no device {str(asked)!r}; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise AttachError(f"slots on {device} are not supported; use cpu or cuda")
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise AttachError(f"this machine has no device {device}; use cpu, or another GPU")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _why_host(
    options: Options, device: torch.device, policies: set[str], model: Model, room: int | None
) -> str | None:
    """Why the host must decide, in words, empty if it was asked to; None if the device can."""
    if options.engine == "reference":
        return ""
    if device.type == "cpu" and options.engine == "auto":
        return "no GPU is used"
    if (name := options.needs_host) is not None:
        return f"because of {name}"
    kind = options.store if isinstance(options.store, str) else options.store.kind
    if kind == "disk" or (kind == "ram" and device.type == "cuda"):
        return f"the GPU cannot read experts in a {kind} store"
    if (reason := why_not(device)) is not None:
        return reason
    for name in policies - set(PACKABLE):
        return f"the GPU can decide by {' or '.join(PACKABLE)}, not by {name}"
    too_many = room is not None and model.added_bytes(options) > room
    if too_many and (options.engine == "auto" or options.ram):
        return (
            f"all experts, {format_bytes(model.expert_bytes)}, do not fit into "
            f"{format_bytes(room or 0)} of host memory"
        )
    return None


def _store(
    options: Options, device: torch.device, engine: str, model: Model, room: int | None
) -> str:
    if not isinstance(options.store, str):
        return options.store.kind
    fits = room is None or model.added_bytes(options) <= room
    if options.store == "disk" and model.in_memory:
        raise AttachError(
            "a model in memory has no files to read experts from; choose the ram or pinned "
            "store, or load the checkpoint with melinoe.load"
        )
    if options.store == "disk" and model.packs:
        raise AttachError(
            "the disk store reads experts as the checkpoint has them, and format packs them; "
            "choose the ram or pinned store, or write a packed checkpoint once with `melinoe pack`"
        )
    if options.store in ("ram", "pinned") and options.ram is not None and not fits:
        raise BudgetError(
            f"the {options.store} store holds all experts, {format_bytes(model.expert_bytes)}, "
            "which is more than ram allows; give more ram, or leave store out"
        )
    if options.store != "auto":
        return options.store
    if device.type == "cuda" and (engine == "fast" or (fits and room is not None)):
        return "pinned"
    if engine == "fast" or model.in_memory or model.packs:
        return "ram"
    # On the CPU slots and store are the same memory: it all goes to slots, unless these are given.
    slots = _asked(options, model.layers)
    if device.type == "cpu" and options.ram is not None and room is not None and slots is not None:
        return "ram" if model.expert_bytes + memory_of(slots, model.layers) <= room else "disk"
    return "disk"


def _asked(options: Options, layers: Sequence[ExpertsLayer]) -> int | Sequence[int] | None:
    """The slots that the user asks for, if any."""
    if options.expert_memory is not None:
        return slots_for(options.expert_memory, layers)
    return options.slots


def _slots(
    options: Options, device: torch.device, engine: str, store: str, model: Model, room: int | None
) -> tuple[int | Sequence[int], GpuBudget | None, str]:
    """Slots, the budget that is to be kept, and in words what they fit into."""
    layers = model.layers
    asked = _asked(options, layers)
    if asked is not None:
        return asked, None, "as asked"
    staging = STAGING_EXPERTS if engine == "fast" else 0
    if device.type == "cpu" and engine != "fast":
        if options.batch is not None or options.context is not None:
            raise AttachError(
                "batch and context share a GPU's memory out, and the model runs on the CPU; leave "
                "them out"
            )
        if options.gpu_memory is not None:
            raise AttachError(
                "gpu_memory limits a GPU's memory, and the model runs on the CPU; "
                "give ram instead, or a device"
            )
    if options.gpu_memory is not None:
        assert model.budget is not None  # only `load` takes gpu_memory
        budget = model.budget(parse_bytes(options.gpu_memory), staging)
        return budget.slots_per_layer, budget, "what fits into gpu_memory"
    if device.type == "cuda":
        free = int(_SHARE * torch.cuda.mem_get_info(device)[0])
        into = f"what fits into {format_bytes(free)} of the GPU"
        if model.budget is not None:
            try:
                return model.budget(free, staging).slots_per_layer, None, into
            except UnknownNeedError:
                pass
        return slots_for(max(free - model.backbone_bytes, 1), layers), None, into
    if room is None:
        return max(layer.num_experts for layer in layers), None, ""
    others = {
        "other weights": model.backbone_bytes if options.ram is None else 0,
        "all experts": 0 if store == "disk" else model.added_bytes(options),
    }
    _check_one_slot(options, room, others, store, model)
    room -= sum(others.values())
    slots = slots_for(room, layers)
    if staged := _staged_bytes([slots] * len(layers), layers, store):
        slots = slots_for(max(room - staged, 1), layers)
    return slots, None, f"what fits into {format_bytes(max(room, 0))}"


def _check_one_slot(
    options: Options, room: int, others: dict[str, int], store: str, model: Model
) -> None:
    """Refuse host memory that holds no slot in each layer beside *others*, and say whose it is."""
    least = memory_of(1, model.layers)
    if least <= room - sum(others.values()):
        return
    found = host_memory()
    whose, way = "that ram allows", "give more ram"
    if options.ram is None and found is not None:
        whose, way = f"that may be taken ({found.limited_by})", "free some, or raise that limit"
    if store == "ram" and not model.in_memory and not model.packs:
        way += ", or choose the disk store"
    elif model.packs:
        way += ", or load a checkpoint that `melinoe pack` wrote in this format"
    beside = " and ".join(
        f"{format_bytes(size)} of {name}" for name, size in others.items() if size
    )
    raise BudgetError(
        f"one expert of each layer, {format_bytes(least)}, does not fit"
        f"{f' beside {beside}' if beside else ''} into the {format_bytes(max(room, 1))} of host "
        f"memory {whose}; {way}"
    )


def _staged_bytes(slots: Sequence[int], layers: Sequence[ExpertsLayer], store: str) -> int:
    """Bytes of the blocks into which experts are read ahead of their use on the CPU."""
    blocks = staging_blocks(slots) if store == "disk" and read_by_threads(layers) else 0
    return blocks * sum({layer.parts: layer.block_bytes for layer in layers}.values())


def _check_host(
    options: Options, device: torch.device, store: str, slots: Sequence[int], model: Model
) -> None:
    """Refuse what the system would end the process for, or *ram* does not allow."""
    on_cpu = device.type == "cpu"
    parts = {
        "experts": 0 if store == "disk" else model.added_bytes(options),
        "slots": memory_of(slots, model.layers) + _staged_bytes(slots, model.layers, store)
        if on_cpu
        else 0,
        "all other weights": model.backbone_bytes if on_cpu else 0,
    }
    what = " and ".join(f"{format_bytes(size)} of {part}" for part, size in parts.items() if size)
    ways = ["give fewer slots"] * on_cpu
    if parts["experts"] and model.packs:
        ways.insert(0, "load a checkpoint from disk that `melinoe pack` wrote in this format")
    elif parts["experts"]:
        other = "load the checkpoint with melinoe.load"
        ways.insert(0, other if model.in_memory else "choose the disk store")
    if what:
        check_host_room(sum(parts.values()), what, ", or ".join(ways))
    taken = parts["experts"] + parts["slots"]
    if options.ram is not None and taken > parse_bytes(options.ram):
        raise BudgetError(
            f"experts would take {format_bytes(taken)} of host memory, slots included, which "
            f"is more than ram allows; give more ram, or {' or '.join(ways)}"
        )
