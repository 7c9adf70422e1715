"""The terms of one batch, and those of all MoE layers, layers of one shape in one call."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from melinoe.config import FinetuneSettings
from melinoe.losses import (
    CausalFilter,
    cache_simulation_loss,
    completion_positions,
    kl_anchor_loss,
    rank_matching_loss,
)
from melinoe.moe.routing import Routing


@dataclass
class Terms:
    """
    Scalars of one batch: means over completion tokens, and over MoE layers where it has them.

    Attributes:
        nll: Next-token loss.
        cache: Cache simulation.
        anchor: Rank matching or KL divergence from the base routers.
        total: What is minimised.
        more: ``reuse``, ``distill`` and ``replay``, those that are in use.
        weights: Name of each term to its weight in *total*, next tokens included.
    """

    nll: Tensor
    cache: Tensor
    anchor: Tensor
    total: Tensor
    more: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def parts(self) -> dict[str, Tensor]:
        """Every term but the total, by name, with its graph."""
        return {"nll": self.nll, "cache": self.cache, "anchor": self.anchor, **self.more}

    def detached(self) -> dict[str, Tensor]:
        """Name -> value without its graph, the total last."""
        return {k: v.detach() for k, v in {**self.parts(), "total": self.total}.items()}


@dataclass(frozen=True)
class Layout:
    """
    What all layers of a batch share.

    Attributes:
        shape: Batch and tokens.
        completion: Flat positions of the tokens that count.
        cache: The filter that fills the imagined cache.
        previous: The filter that sees the previous token alone; ``None`` without a reuse term.
        denominator: What sums over tokens are divided by; ``None``: the tokens that count.
    """

    shape: torch.Size
    completion: Tensor
    cache: CausalFilter
    previous: CausalFilter | None
    denominator: Tensor | float | None

    @classmethod
    def of(
        cls,
        mask: Tensor,
        segment_ids: Tensor,
        settings: FinetuneSettings,
        denominator: Tensor | float | None,
    ) -> "Layout":
        """From a bool mask of the tokens that count, and segments, both ``(batch, tokens)``."""
        reuse = settings.lambda_reuse > 0
        return cls(
            mask.shape,
            completion_positions(mask),
            CausalFilter.of(segment_ids, settings.gamma),
            CausalFilter.of(segment_ids, 0.0) if reuse else None,
            denominator,
        )


class Stack:
    """
    Layers of one shape as one tensor: ``(batch, tokens, layers, experts)``.

    Args:
        routings: What layers with equal numbers of experts, logits and choices recorded.
        layout: Of the batch.
    """

    def __init__(self, routings: Sequence[Routing], layout: Layout):
        self.routings, self.layout = routings, layout
        self.num_experts = routings[0].router.num_experts
        self.top_k = routings[0].top_k_index.shape[-1]
        self.logits = self._stack([one.logits for one in routings])
        self.index = self._stack([one.top_k_index for one in routings])

    def _stack(self, by_layer: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(by_layer), dim=1)
        return stacked.view(*self.layout.shape, *stacked.shape[1:])

    def cache(self, capacities: Sequence[float], settings: FinetuneSettings) -> Tensor:
        """Cache simulation, one value per layer."""
        return cache_simulation_loss(
            self.logits,
            self.index,
            self.layout.completion,
            self.layout.cache,
            capacity=_one_or_each(capacities, self.logits),
            num_experts=self.num_experts,
            form=settings.cache_loss,  # type: ignore[arg-type]
            cache_gradient=settings.cache_gradient,
            swap_margin=settings.swap_margin,
            denominator=self.layout.denominator,
        )

    def reuse(self) -> Tensor:
        """
        How many of a token's experts the token before it did not use, one value per layer.

        That is the cache simulation with a cache of the previous token's experts: gamma 0, C = K.
        """
        assert self.layout.previous is not None
        return cache_simulation_loss(
            self.logits,
            self.index,
            self.layout.completion,
            self.layout.previous,
            capacity=self.top_k,
            num_experts=self.num_experts,
            denominator=self.layout.denominator,
        )

    def anchor(self, base_logits: Sequence[Tensor], settings: FinetuneSettings) -> Tensor:
        """Rank matching or KL divergence, one value per layer."""
        base = self._stack(list(base_logits))
        completion, denominator = self.layout.completion, self.layout.denominator
        if settings.anchor == "kl":
            return kl_anchor_loss(self.logits, base, completion, denominator=denominator)
        return rank_matching_loss(
            self.logits,
            base,
            completion,
            rho=settings.rho,
            reduce=settings.rank_reduce,  # type: ignore[arg-type]
            denominator=denominator,
        )


def stacks_of(routings: Sequence[Routing], layout: Layout) -> list[Stack]:
    """Group layers by shape, in the order of their first layers."""
    groups: dict[tuple[int, ...], list[Routing]] = {}
    for one in routings:
        key = (one.router.num_experts, one.logits.shape[-1], one.top_k_index.shape[-1])
        groups.setdefault(key, []).append(one)
    return [Stack(group, layout) for group in groups.values()]


def weighing(weight: float) -> torch.no_grad | nullcontext[None]:
    """No graph for a term that is only watched."""
    return nullcontext() if weight else torch.no_grad()


def _one_or_each(values: Sequence[float], like: Tensor) -> float | Tensor:
    if all(value == values[0] for value in values):
        return values[0]
    return torch.tensor(values, dtype=torch.float32, device=like.device)
