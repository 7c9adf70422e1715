"""
The training objective: next-token loss plus the weighted locality terms of every MoE layer.

Terms whose weight is 0 are computed too, without gradient, so that a control shows its cache loss
beside the fine-tuned model's.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from melinoe.config import FinetuneSettings, experts_in_share
from melinoe.data import IGNORED
from melinoe.errors import TrainingError
from melinoe.losses import (
    CausalFilter,
    cache_simulation_loss,
    kl_anchor_loss,
    rank_matching_loss,
    segments_of,
)
from melinoe.moe.routing import BaseRouters, Router, Routing


@dataclass
class Terms:
    """Scalars of one batch: means over MoE layers and completion tokens."""

    nll: Tensor
    cache: Tensor
    anchor: Tensor
    total: Tensor

    def detached(self) -> dict[str, Tensor]:
        """Name -> value without its graph."""
        return {name: getattr(self, name).detach() for name in ("nll", "cache", "anchor", "total")}


class Objective:
    """
    Weighs what a forward pass recorded.

    Args:
        routers: Of the model before training; their weights now are the base router's.
        settings: The weights and forms of the terms.

    Raises:
        TrainingError: the cache would be smaller than what one token needs.
    """

    def __init__(self, routers: list[Router], settings: FinetuneSettings):
        self.settings = settings
        self.base = BaseRouters(routers)
        for router in routers:
            if router.top_k is not None:
                self._check_capacity(router, int(router.top_k))

    def __call__(
        self,
        nll: Tensor,
        routings: list[Routing],
        labels: Tensor,
        attention_mask: Tensor,
        denominator: Tensor | float | None = None,
    ) -> Terms:
        """
        Combine a batch's next-token loss with its locality terms.

        Args:
            nll: Mean next-token loss, with gradient.
            routings: What each layer recorded in the pass that gave *nll*.
            labels: int64 ``(batch, tokens)``, -100 on prompt and padding.
            attention_mask: ``(batch, tokens)``.
            denominator: Completion tokens of the whole step; default: of this batch.
        """
        settings, mask = self.settings, labels != IGNORED
        causal_filter = CausalFilter.of(segments_of(attention_mask), settings.gamma)
        cache, anchor = [], []
        for routing in routings:
            router = routing.router
            self._check_capacity(router, routing.top_k_index.shape[-1])
            logits = routing.logits.view(*labels.shape, -1)
            with nullcontext() if settings.lambda_cache else torch.no_grad():
                cache.append(
                    cache_simulation_loss(
                        logits,
                        routing.top_k_index.view(*labels.shape, -1),
                        mask,
                        causal_filter,
                        capacity=experts_in_share(settings.capacity, router.num_experts),
                        num_experts=router.num_experts,
                        form=settings.cache_loss,  # type: ignore[arg-type]
                        cache_gradient=settings.cache_gradient,
                        denominator=denominator,
                    )
                )
            if settings.anchor != "none":
                with nullcontext() if settings.lambda_rank else torch.no_grad():
                    anchor.append(self._anchor(routing, logits, mask, denominator))
        zero = nll.new_zeros(())
        mean_cache = torch.stack(cache).mean() if cache else zero
        mean_anchor = torch.stack(anchor).mean() if anchor else zero
        total = nll + settings.lambda_cache * mean_cache + settings.lambda_rank * mean_anchor
        return Terms(nll, mean_cache, mean_anchor, total)

    def _anchor(
        self, routing: Routing, logits: Tensor, mask: Tensor, denominator: Tensor | float | None
    ) -> Tensor:
        base_logits = self.base.logits(routing).view(logits.shape)
        if self.settings.anchor == "kl":
            return kl_anchor_loss(logits, base_logits, mask, denominator=denominator)
        return rank_matching_loss(
            logits,
            base_logits,
            mask,
            rho=self.settings.rho,
            reduce=self.settings.rank_reduce,  # type: ignore[arg-type]
            denominator=denominator,
        )

    def _check_capacity(self, router: Router, top_k: int) -> None:
        capacity = experts_in_share(self.settings.capacity, router.num_experts)
        if capacity < top_k:
            raise TrainingError(
                f"a capacity of {self.settings.capacity} is {capacity} of {router.num_experts} "
                f"experts, fewer than the {top_k} that each token uses; "
                f"raise it to {top_k / router.num_experts:.3g} or more"
            )
