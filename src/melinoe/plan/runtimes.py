"""A model opened once for each cache that is compared, experts in host memory held once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from melinoe.checkpoint import load_tokenizer, open_checkpoint
from melinoe.engine.handle import Handle
from melinoe.engine.load import load
from melinoe.engine.misses import Misses
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import AttachError
from melinoe.host_memory import check_host_room, format_bytes
from melinoe.plan.strategies import Strategy


@dataclass(frozen=True)
class Setting:
    """
    Settings that all strategies share.

    Attributes:
        model: Path or hub name.
        device: Where it runs.
        dtype: Type of the weights, or ``auto``.
        store: As `melinoe.engine.load.load`.
        link: Bandwidth in bytes a second and latency of an emulated link; None for the real one.
        max_new_tokens: For each prompt.
        repeat: Runs of each prompt, for steadier times; strategies with a warm cache run once.
    """

    model: str
    device: str = "cpu"
    dtype: str = "auto"
    store: str = "auto"
    link: tuple[float, float] | None = None
    max_new_tokens: int = 64
    repeat: int = 1

    def new_link(self) -> EmulatedLink | None:
        """A link of one's own: strategies do not queue behind one another."""
        return None if self.link is None else EmulatedLink(*self.link)


@dataclass
class Runtimes:
    """A model and its handle for each cache, and the tokenizer."""

    tokenizer: Any
    opened: dict[Strategy, tuple[Any, Handle]] = field(default_factory=dict)

    def __getitem__(self, strategy: Strategy) -> tuple[Any, Handle]:
        return self.opened[strategy.runtime]


def open_runtimes(setting: Setting, chosen: Sequence[Strategy]) -> Runtimes:
    """
    Load the model once for each cache; experts in host memory are shared by all.

    Raises:
        BudgetError: host memory does not hold them all.
        MelinoeError: as `melinoe.engine.load.load`.
    """
    kinds = list(dict.fromkeys(one.runtime for one in chosen))
    kinds.sort(key=lambda kind: -kind.slots)
    with open_checkpoint(setting.model, setting.dtype) as checkpoint:
        backbone = checkpoint.backbone_bytes
        held = 0 if setting.store in ("auto", "disk") else checkpoint.expert_bytes
        experts = [(layer.num_experts, layer.block_bytes) for layer in checkpoint.layers]
        config = checkpoint.config
    slots = sum(min(kind.slots, n) * size for kind in kinds for n, size in experts)
    if setting.device == "cpu":
        needed = held + len(kinds) * backbone + slots
        what = f"{len(kinds)} caches side by side, {format_bytes(needed)} of them,"
        check_host_room(needed, what, "try fewer --slots or --policy at once")
    runtimes = Runtimes(load_tokenizer(setting.model, config))
    shared: dict[str, Any] = {}  # by engine, the store of the first runtime
    measured: dict[str, Misses] = {}
    for kind in kinds:
        reference = kind.engine == "reference"
        model, handle = load(
            setting.model,
            setting.device,
            engine=kind.engine,
            slots=kind.slots,
            policy=kind.policy,
            store=shared.get(kind.engine, setting.store if reference else "auto"),
            dtype=setting.dtype,
            link=setting.new_link() if reference else None,
            miss=measured.get(kind.miss, kind.miss) if reference else "wait",
        )
        if handle.store.kind != "disk":
            shared[kind.engine] = handle.store
        if handle.misses.machine is not None:  # measured once, for all
            measured |= {way: replace(handle.misses, kind=way) for way in ("cpu", "split")}
        runtimes.opened[kind] = (model, handle)
    return runtimes


def check_fast(device: str, emulated: bool) -> None:
    """
    Refuse the fast engine where it cannot run, before anything is read.

    Raises:
        AttachError: it cannot, or an emulated link is asked for, which it does not know.
    """
    if find_spec("triton") is None:
        reason: str | None = "Triton is not installed"
    else:
        from melinoe.engine.device.support import why_not

        reason = why_not(torch.device(device))
    if reason is None and emulated:
        reason = "it has no emulated link"
    if reason is not None:
        raise AttachError(f"the fast engine cannot run here: {reason}; give --engine reference")
