"""A model opened once for each cache that is compared, experts in host memory held once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from melinoe.checkpoint import load_backbone, load_tokenizer, open_checkpoint
from melinoe.checkpoint.backbone import layers_of
from melinoe.errors import BudgetError
from melinoe.plan.strategies import Strategy
from melinoe.runtime.attach import attach_stores
from melinoe.runtime.budget import format_bytes
from melinoe.runtime.handle import Handle
from melinoe.runtime.host_memory import free_host_bytes
from melinoe.runtime.load import load
from melinoe.runtime.transfer import EmulatedLink


@dataclass(frozen=True)
class Setting:
    """
    What all strategies have in common.

    Attributes:
        model: Path or hub name.
        device: Where it runs.
        dtype: Type of the weights, or ``auto``.
        store: As `melinoe.runtime.load.load`.
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
    opened: dict[tuple[int, str, bool], tuple[Any, Handle]] = field(default_factory=dict)

    def __getitem__(self, strategy: Strategy) -> tuple[Any, Handle]:
        return self.opened[strategy.runtime]


def open_runtimes(setting: Setting, chosen: Sequence[Strategy]) -> Runtimes:
    """
    Load the model once for each cache; experts in host memory are shared by all.

    Raises:
        BudgetError: host memory does not hold them all.
        MelinoeError: as `melinoe.runtime.load.load`.
    """
    kinds = list(dict.fromkeys(one.runtime for one in chosen))
    kinds.sort(key=lambda kind: -kind[0])
    with open_checkpoint(setting.model, setting.dtype) as checkpoint:
        backbone = sum(place.info.nbytes for place in checkpoint.backbone)
        experts = [(layer.num_experts, layer.block_bytes) for layer in checkpoint.layers]
        config = checkpoint.config
    slots = sum(min(kind[0], n) * size for kind in kinds for n, size in experts)
    if setting.device == "cpu":
        _check_room(len(kinds) * backbone + slots, len(kinds))
    runtimes = Runtimes(load_tokenizer(setting.model, config))
    first: Handle | None = None
    for count, policy, warm in kinds:
        if first is None or first.store.kind == "disk":
            model, handle = load(
                setting.model,
                setting.device,
                slots=count,
                policy=policy,
                store=setting.store,
                dtype=setting.dtype,
                link=setting.new_link(),
            )
            first = first or handle
        else:
            with open_checkpoint(setting.model, setting.dtype) as checkpoint:
                model = load_backbone(checkpoint, setting.device)
                layers = layers_of(checkpoint, model)
            handle = attach_stores(
                model,
                layers,
                first.store,
                slots=count,
                policy=policy,
                link=setting.new_link(),
                device=setting.device,
            )
        runtimes.opened[count, policy, warm] = (model, handle)
    return runtimes


def _check_room(needed: int, runtimes: int) -> None:
    free = free_host_bytes()
    if free is not None and needed > free:
        raise BudgetError(
            f"{runtimes} caches side by side need {format_bytes(needed)} of host memory, and "
            f"{format_bytes(free)} are free; try fewer --slots or --policy at once"
        )
