"""
The trained parts of a model: routers in full, low-rank updates of experts and of attention.

Each update is a child module, ``low_rank``, of the module that it changes, with PEFT's form and
starting values: ``alpha / rank x B A``, A uniform within ``1 / sqrt(in)``, B zero. Base weights
keep their names, by which teachers, checkpoints of a run and sharding know them.

The update of one projection of expert *e* is ``alpha / rank x B_e A_e``. PEFT adds it to the whole
stack of weights before each forward pass, and its gradient has the size of that stack; here the
tokens of an expert go through ``A_e`` and ``B_e`` beside their grouped product with ``W_e``. The
numbers are PEFT's up to rounding, which in bfloat16 is less: PEFT rounds ``W + B A``.

Every update is in the graph of every forward pass. An expert that no token chose gets a gradient of
zeros, never none, so that distributed training finds the same gradients on each process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.moe.attention import find_attention
from melinoe.moe.dispatch import bind, unbind, use_melinoe
from melinoe.moe.experts import ADAPTER, ExpertsLayer, family
from melinoe.moe.grouped import aligned_size, grouped_experts, grouped_product
from melinoe.moe.routing import Router

Compute = Callable[..., Tensor]
"""Called as `grouped_experts`."""

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class LowRank(nn.Module):
    """
    The updates of one experts module.

    Args:
        layer: The module, on any device; its weights are not read.
        rank: Of each update.
        alpha: Updates are multiplied by ``alpha / rank``.
        generator: On the CPU; decides the starting values.

    Attributes:
        lora_A: Per projection, float32 ``(num_experts, rank, in)``.
        lora_B: Per projection, float32 ``(num_experts, out, rank)``.
        enabled: Whether forward passes add them.
        instead: Updates that act in place of these, or none of them, in a tuple of one: so they
            are no submodule, whose parameters would be this module's own.
    """

    def __init__(
        self, layer: ExpertsLayer, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.rank, self.scaling, self.enabled = rank, alpha / rank, True
        self.instead: tuple[LowRank | None] | None = None
        self.is_transposed = is_transposed(layer.module)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for tensor in layer.tensors:
            if tensor.name not in PROJECTIONS:
                continue
            device = layer.module.get_parameter(tensor.name).device
            into, out = tensor.shape if self.is_transposed else tensor.shape[::-1]
            start = torch.empty(layer.num_experts, rank, into)
            start.uniform_(-1 / math.sqrt(into), 1 / math.sqrt(into), generator=generator)
            zeros = torch.zeros(layer.num_experts, out, rank, device=device)
            self.lora_A[tensor.name] = nn.Parameter(start.to(device))
            self.lora_B[tensor.name] = nn.Parameter(zeros)

    @property
    def names(self) -> list[str]:
        """The projections that are updated, in the module's own order."""
        return list(self.lora_A)

    def forward(self, name: str, rows: Tensor, offsets: Tensor) -> Tensor:
        """Compute what the update of projection *name* adds; an `Addition` of `grouped_experts`."""
        return self.term(self.lora_A[name], self.lora_B[name], rows, offsets)

    def term(self, down: Tensor, up: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
        """Compute the same from the factors of those experts that *offsets* count."""
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        # Rows of zeros, so that torch's kernel takes any rank.
        if missing := aligned_size(self.rank, rows.dtype) - self.rank:
            down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
        inner = grouped_product(rows, down.transpose(-2, -1), offsets) * self.scaling
        return grouped_product(inner, up.transpose(-2, -1), offsets)

    def add_to(self, module: nn.Module) -> None:
        """Add the updates to the module's weights in place, expert by expert, rounded once."""
        for name in self.names:
            weight, down, up = module.get_parameter(name), self.lora_A[name], self.lora_B[name]
            for expert in range(weight.shape[0]):
                add_update(
                    weight[expert], down[expert], up[expert], self.scaling, self.is_transposed
                )


class LinearUpdate(nn.Module):
    """
    The update of one linear projection.

    Args:
        projection: Gives shapes and device; its weight is not read.
        rank: Of the update.
        alpha: The update is multiplied by ``alpha / rank``.
        generator: On the CPU; decides the starting values.

    Attributes:
        lora_A: float32 ``(rank, in)``.
        lora_B: float32 ``(out, rank)``.
        enabled, instead: As `LowRank`'s.
    """

    def __init__(
        self, projection: nn.Linear, rank: int, alpha: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scaling, self.enabled = alpha / rank, True
        self.instead: tuple[LinearUpdate | None] | None = None
        bound = 1 / math.sqrt(projection.in_features)
        start = torch.empty(rank, projection.in_features).uniform_(
            -bound, bound, generator=generator
        )
        device = projection.weight.device
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(projection.out_features, rank, device=device))

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute what the update adds to the projection of *inputs*."""
        inner = linear(inputs, self.lora_A.to(inputs.dtype)) * self.scaling
        return linear(inner, self.lora_B.to(inner.dtype))

    def add_to(self, projection: nn.Linear) -> None:
        """Add the update to the projection's weight in place, rounded once."""
        add_update(projection.weight, self.lora_A, self.lora_B, self.scaling, False)


class Updates:
    """
    Base of the updates of several modules of a model: left out of a pass, replaced, merged.

    Modules that share their weights share their update.

    Args:
        sites: Full name and module of each that has an update.
        rank: Of each update.
        alpha: Updates are multiplied by ``alpha / rank``.
    """

    def __init__(self, sites: Mapping[str, nn.Module], rank: int, alpha: float) -> None:
        self._sites, self.rank, self.alpha = dict(sites), rank, alpha

    def places(self) -> list[Any]:
        """The update modules, one for each site; shared ones come again."""
        return [site.get_submodule(ADAPTER) for site in self._sites.values()]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Full name and parameter of every update; a shared one by its first name."""
        return _once(
            (f"{name}.{ADAPTER}.{key}", parameter)
            for name, update in zip(self._sites, self.places(), strict=True)
            for key, parameter in update.named_parameters()
        )

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the model computes as if it had no updates: a pass of the base model."""
        with _switched(self.places(), "enabled", [False] * len(self._sites)):
            yield

    @contextmanager
    def replaced(self, others: Sequence[Any]) -> Iterator[None]:
        """
        Within it, other updates act in place of these.

        Args:
            others: One for each place, on its device; ``None``: that place has no update.
        """
        with _switched(self.places(), "instead", [(other,) for other in others]):
            yield

    def remove(self, *, merge: bool) -> None:
        """Take the updates off the model; with *merge*, add them to its weights before."""
        merged: set[nn.Module] = set()
        for site, update in zip(self._sites.values(), self.places(), strict=True):
            if merge and update not in merged:
                update.add_to(site)
                merged.add(update)
            delattr(site, ADAPTER)


class LowRankUpdates(Updates):
    """
    The updates of all MoE layers of a model, on the model while it trains.

    The parameters are ordinary ones, ``<experts module>.low_rank.lora_A.<projection>``: they are
    seen by ``named_parameters()``, wrapped by DDP and FSDP2, moved with the model.

    Args:
        model: Gets the updates, and their experts function, in place.
        layers: Of *model*, from `find_experts`.
        rank, alpha: As in `Updates`.
        seed: Decides the starting values, equally on each device and process.
        compute: Computes an experts module with an update.

    Raises:
        AttachError: a runtime is attached to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertsLayer],
        rank: int,
        alpha: float,
        seed: int,
        compute: Compute = grouped_experts,
    ) -> None:
        super().__init__({layer.name: layer.module for layer in layers}, rank, alpha)
        self.layers = list(layers)
        generator = torch.Generator().manual_seed(seed)
        by_weight: dict[int, LowRank] = {}
        for layer in self.layers:
            weight = id(layer.module.get_parameter("down_proj"))
            if weight not in by_weight:
                by_weight[weight] = LowRank(layer, rank, alpha, generator)
            layer.module.add_module(ADAPTER, by_weight[weight])
            bind(layer.module, partial(_updated_experts, compute, layer.module))
        self._restore: Callable[[], None] = use_melinoe(model)

    def of(self, layer: ExpertsLayer) -> LowRank:
        """Return the updates of one layer."""
        return layer.module.get_submodule(ADAPTER)  # type: ignore[return-value]

    def remove(self, *, merge: bool) -> None:
        """Also take the hooks off the model."""
        super().remove(merge=merge)
        for layer in self.layers:
            unbind(layer.module)
        self._restore()


class AttentionUpdates(Updates):
    """
    The updates of all attention projections of a model, on the model while it trains.

    Args:
        projections: Full name and module, from `find_attention`; each gets its update, in place.
        rank, alpha, seed: As in `LowRankUpdates`.
    """

    def __init__(
        self, projections: Mapping[str, nn.Linear], rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__(projections, rank, alpha)
        self.projections = dict(projections)
        generator = torch.Generator().manual_seed(seed)
        by_weight: dict[int, LinearUpdate] = {}
        self._handles = []
        for projection in self.projections.values():
            update = by_weight.get(id(projection.weight))
            if update is None:
                update = LinearUpdate(projection, rank, alpha, generator)
                by_weight[id(projection.weight)] = update
            projection.add_module(ADAPTER, update)
            self._handles.append(projection.register_forward_hook(_add_update))

    def of(self, name: str) -> LinearUpdate:
        """Return the update of one projection."""
        return self.projections[name].get_submodule(ADAPTER)  # type: ignore[return-value]

    def remove(self, *, merge: bool) -> None:
        """Also take the hooks off the model."""
        super().remove(merge=merge)
        for handle in self._handles:
            handle.remove()


@dataclass
class TrainedParts:
    """
    The trained parameters of a model, and how to make it plain again.

    Attributes:
        router: Router parameters by full name.
        lora: Parameters of the updates by full name; empty if only routers are trained.
        routers: The routers they belong to.
        updates: The updates of experts, as long as they are on the model.
        attention: The updates of attention projections, likewise.
    """

    router: dict[str, nn.Parameter]
    lora: dict[str, nn.Parameter]
    routers: list[Router] = field(default_factory=list, repr=False)
    updates: LowRankUpdates | None = field(default=None, repr=False)
    attention: AttentionUpdates | None = field(default=None, repr=False)

    def _on_model(self) -> list[Updates]:
        return [one for one in (self.updates, self.attention) if one is not None]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, no update acts: with base routers, a pass is the base model's."""
        with ExitStack() as stack:
            for updates in self._on_model():
                stack.enter_context(updates.disabled())
            yield

    def all(self) -> list[nn.Parameter]:
        """Every trained parameter, routers first."""
        return [*self.router.values(), *self.lora.values()]

    def names(self) -> list[str]:
        """Full names of all tensors of the model that training and `merge` change."""
        names = list(self.router)
        if self.updates is not None:
            for layer in self.updates.layers:
                names += [f"{layer.name}.{one}" for one in self.updates.of(layer).names]
        if self.attention is not None:
            names += [f"{name}.weight" for name in self.attention.projections]
        return names

    def merge(self) -> None:
        """Add the updates to the weights they belong to and take them off the model."""
        for updates in self._on_model():
            updates.remove(merge=True)
        self.updates = self.attention = None


def make_trainable(
    model: nn.Module,
    routers: list[Router],
    layers: list[ExpertsLayer],
    settings: FinetuneSettings,
    rank: int,
) -> TrainedParts:
    """
    Freeze *model* and open the parts that *settings* name, in float32.

    Args:
        model: Changed in place: with updates of experts, a low-rank function computes them.
        routers: Of *model*, from `find_routers`.
        layers: Of *model*, from `find_experts`.
        settings: ``train``, ``lora_alpha``, ``seed``.
        rank: Of each update.

    Raises:
        TrainingError: the routers' weights are frozen by the model itself, or hold integers.
        UnsupportedModelError: attention is to be trained, and none is found.
    """
    # Some families keep constants as parameters that never need a gradient; they stay constant.
    router = _once(
        (name, parameter)
        for one in routers
        for name, parameter in one.parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    )
    if any(not one.weight.requires_grad for one in routers):
        raise TrainingError(
            f"the routers of {family(model)} are frozen; load it without frozen weights"
        )
    model.requires_grad_(False)
    for parameter in router.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if settings.train == "router":
        return TrainedParts(router, {}, routers)
    attention = None
    if settings.train == "router+experts+attention":
        attention = find_attention(model, layers)
    alpha, seed = settings.lora_alpha, settings.seed
    updates = LowRankUpdates(model, layers, rank, alpha, seed)
    parts = TrainedParts(router, updates.parameters(), routers, updates)
    if attention is not None:
        parts.attention = AttentionUpdates(attention, rank, alpha, seed)
        parts.lora |= parts.attention.parameters()
    return parts


@torch.no_grad()
def add_update(
    weight: Tensor, down: Tensor, up: Tensor, scaling: float, is_transposed: bool
) -> None:
    """
    Add ``scaling x B A`` to one matrix in place: in float32 or wider, rounded once.

    Args:
        weight: ``(out, in)``, or ``(in, out)`` where *is_transposed*.
        down: A, ``(rank, in)``.
        up: B, ``(out, rank)``.
        scaling: Factor of the product.
        is_transposed: Layout of *weight*.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = scaling * (up.to(wide) @ down.to(wide))
    weight.copy_(weight.to(wide) + (update.T if is_transposed else update))


def is_transposed(module: nn.Module) -> bool:
    """Whether an experts module stores its matrices as ``(in, out)``."""
    return bool(getattr(module, "is_transposed", False))


def _acting(site: nn.Module) -> Any:
    """The update that acts on a module now, or none."""
    update: Any = getattr(site, ADAPTER)
    if update.instead is not None:
        return update.instead[0]
    return update if update.enabled else None


def _updated_experts(compute: Compute, module: nn.Module, *given: Tensor) -> Tensor:
    return compute(module, *given, _acting(module))


def _add_update(projection: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    addition = _acting(projection)
    return output if addition is None else output + addition(inputs[0]).to(output.dtype)


@contextmanager
def _switched(modules: Sequence[Any], name: str, values: Sequence[Any]) -> Iterator[None]:
    """Within it, an attribute of each module has another value."""
    before = [getattr(module, name) for module in modules]
    for module, value in zip(modules, values, strict=True):
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            setattr(module, name, value)


def _once(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Parameters by name; one that has several names by its first, as in ``named_parameters()``."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        first.setdefault(id(parameter), (name, parameter))
    return dict(first.values())
