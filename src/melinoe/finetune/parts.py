"""
The trained parts of a model: routers in full, low-rank updates of experts and of attention.

Each update is a child module, ``low_rank``, of the module that it changes, with PEFT's form and
starting values: ``alpha / rank x B A``, A uniform within ``1 / sqrt(in)``, B zero. PEFT adds it to
a stack of experts before each pass, with a gradient of the stack's size; here the tokens of an
expert go through its A and B beside their grouped product. The numbers are PEFT's up to rounding,
which in bfloat16 is less: PEFT rounds ``W + B A``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Parameter name to A ``(rank, in)`` and B ``(out, rank)``; of experts with their number before."""


class LowRank(nn.Module):
    """The updates of one module's weights, in float32: ``scaling x B A``, by parameter name."""

    def __init__(self, factors: Factors, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, (down, up) in factors.items():
            self.lora_A[name] = nn.Parameter(down.float())
            self.lora_B[name] = nn.Parameter(up.float())

    @property
    def names(self) -> list[str]:
        """The parameters that are updated, in the module's own order."""
        return list(self.lora_A)

    def forward(self, name: str, rows: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Compute what the update of *name* adds; with offsets, an `Addition` of its experts."""
        return self.term(self.lora_A[name], self.lora_B[name], rows, offsets)

    def term(self, down: Tensor, up: Tensor, rows: Tensor, offsets: Tensor | None) -> Tensor:
        """Compute the same from these factors: of the experts that *offsets* count."""
        if offsets is None:
            inner = linear(rows, down.to(rows.dtype)) * self.scaling
            return linear(inner, up.to(inner.dtype))
        down, up = down.to(rows.dtype), up.to(rows.dtype)
        # Rows of zeros, so that torch's kernel takes any rank.
        if missing := aligned_size(rank := down.shape[-2], rows.dtype) - rank:
            down, up = pad(down, (0, 0, 0, missing)), pad(up, (0, missing))
        inner = grouped_product(rows, down.transpose(-2, -1), offsets) * self.scaling
        return grouped_product(inner, up.transpose(-2, -1), offsets)


class LowRankUpdates:
    """
    The updates of a model's experts and *attention*, on the model while it trains.

    The parameters are ordinary ones, ``<module>.low_rank.lora_A.<name>``: wrapped by DDP and FSDP2,
    moved with the model. Every update is in the graph of every pass: an expert that no token chose
    gets a gradient of zeros, so that all processes find the same. Modules that share their weights
    share their update. *compute* computes an experts module with its update, as `grouped_experts`;
    *device*: where experts' updates are kept, absent: where their weights are.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertsLayer],
        rank: int,
        alpha: float,
        seed: int,
        compute: Callable[..., Tensor] = grouped_experts,
        attention: Mapping[str, nn.Module] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.rank, self.alpha, self.layers = rank, alpha, list(layers)
        self.attention = dict(attention or {})
        self.sites = {layer.name: layer.module for layer in layers} | self.attention
        shared: dict[int, LowRank] = {}
        generator = torch.Generator()

        def place(
            module: nn.Module, shapes: Mapping[str, Sequence[int]], device: torch.device | None
        ) -> None:
            last = module.get_parameter(list(shapes)[-1])
            if id(last) not in shared:
                form = (rank, is_transposed(module), generator, device or last.device)
                factors = {name: _start(shape, *form) for name, shape in shapes.items()}
                shared[id(last)] = LowRank(factors, alpha / rank)
            module.add_module(ADAPTER, shared[id(last)])

        generator.manual_seed(seed)
        for layer in self.layers:
            updated = [one for one in layer.tensors if one.name in PROJECTIONS]
            # Not of the module's weights, which may be elsewhere.
            place(layer.module, {t.name: (layer.num_experts, *t.shape) for t in updated}, device)
            bind(layer.module, partial(_updated_experts, compute, layer.module))
        self._restore = use_melinoe(model) if self.layers else lambda: None
        generator.manual_seed(seed)
        self._hooks = []
        for projection in self.attention.values():
            place(projection, {"weight": projection.get_parameter("weight").shape}, None)
            self._hooks.append(projection.register_forward_hook(_add_update))

    def of(self, site: ExpertsLayer | str) -> LowRank:
        """Return the updates of one layer, or of the module of that name."""
        name = site if isinstance(site, str) else site.name
        return self.sites[name].get_submodule(ADAPTER)  # type: ignore[return-value]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Full name and parameter of every update; a shared one by its first name."""
        return _once(
            (f"{name}.{ADAPTER}.{key}", parameter)
            for name in self.sites
            for key, parameter in self.of(name).named_parameters()
        )

    def remove(self) -> None:
        """Take the updates off the model."""
        for module in self.sites.values():
            delattr(module, ADAPTER)
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            unbind(layer.module)
        self._restore()


@dataclass
class TrainedParts:
    """The trained parameters of a model by full name, of routers and of updates."""

    router: dict[str, nn.Parameter]
    lora: dict[str, nn.Parameter]
    routers: list[Router] = field(default_factory=list, repr=False)
    updates: LowRankUpdates | None = field(default=None, repr=False)

    def all(self) -> list[nn.Parameter]:
        """Every trained parameter, routers first."""
        return [*self.router.values(), *self.lora.values()]


def make_trainable(
    model: nn.Module,
    routers: list[Router],
    layers: list[ExpertsLayer],
    settings: FinetuneSettings,
    rank: int,
    compute: Callable[..., Tensor] = grouped_experts,
    device: torch.device | None = None,
) -> TrainedParts:
    """
    Freeze *model* and open the parts that ``settings.train`` names, in float32. TrainingError: the
    routers' weights are frozen by the model itself. UnsupportedModelError: attention is to be
    trained, and none is found.
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
    parts = TrainedParts(router, {}, routers)
    if settings.train != "router":
        wide = settings.train == "router+experts+attention"
        attention = find_attention(model, layers) if wide else None
        given = (rank, settings.lora_alpha, settings.seed)
        parts.updates = LowRankUpdates(model, layers, *given, compute, attention, device)
        parts.lora = parts.updates.parameters()
    return parts


@torch.no_grad()
def add_update(
    weight: Tensor, down: Tensor, up: Tensor, scaling: float, transposed: bool = False
) -> None:
    """Add ``scaling x B A`` to a matrix or a stack in place: in float32 or wider, rounded once."""
    if weight.dim() > 2:  # one by one: a whole stack in float32 would not fit
        for one, its_down, its_up in zip(weight, down, up, strict=True):
            add_update(one, its_down, its_up, scaling, transposed)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = scaling * (up.to(weight.device, wide) @ down.to(weight.device, wide))
    weight.copy_(weight.to(wide) + (update.T if transposed else update))


def is_transposed(module: nn.Module) -> bool:
    """Tell whether an experts module stores its matrices as ``(in, out)``."""
    return bool(getattr(module, "is_transposed", False))


def _start(
    shape: Sequence[int],
    rank: int,
    transposed: bool,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Make the starting factors of one weight's update."""
    *stack, out, into = (*shape[:-2], *shape[:-3:-1]) if transposed else shape
    bound = 1 / math.sqrt(into)
    down = torch.empty(*stack, rank, into).uniform_(-bound, bound, generator=generator)
    return down.to(device), torch.zeros(*stack, out, rank, device=device)


def _updated_experts(compute: Callable[..., Tensor], module: nn.Module, *given: Tensor) -> Tensor:
    return compute(module, *given, getattr(module, ADAPTER))


def _add_update(projection: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + getattr(projection, ADAPTER)("weight", inputs[0]).to(output.dtype)


def _once(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Parameters by name; one that has several names by its first, as in ``named_parameters()``."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named:
        first.setdefault(id(parameter), (name, parameter))
    return dict(first.values())
