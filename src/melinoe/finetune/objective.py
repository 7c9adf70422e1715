"""
The training objective: next-token loss plus weighted terms over every MoE layer.

    nll      next-token loss on completion tokens
    cache    cache simulation: experts of a token that an imagined cache lacks
    rank     rank matching: the base router's order of experts that a router breaks
    concentration   few experts within a sequence, all of them over the batch
    replay   next-token loss on anchor text

The cache term is computed without gradient where its weight is 0, so that a control shows it beside
the fine-tuned model's. Replay is computed only if it weighs something.
"""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.config import FinetuneSettings, experts_in_share
from melinoe.data import IGNORED, Collator, Encoded
from melinoe.errors import TrainingError, UnsupportedModelError
from melinoe.finetune.head import run_to_head
from melinoe.losses import (
    cache_simulation_loss,
    completion_positions,
    concentration_loss,
    next_token_loss,
    rank_matching_loss,
)
from melinoe.moe.base_routers import BaseRouters
from melinoe.moe.routing import Router, Routing, RoutingRecorder

REPLAYED_AT_ONCE = 2  # texts beside each batch


@dataclass
class Terms:
    """The loss terms of one batch by name, with their graph, and what is minimised."""

    values: dict[str, Tensor]
    total: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def detached(self) -> dict[str, Tensor]:
        """Name to value without its graph, the total last."""
        return {name: one.detach() for name, one in {**self.values, "total": self.total}.items()}


class Replay:
    """
    Batches of anchor text: text of other kinds whose quality training should keep. Seed and
    position in the run decide a batch, so a resumed run sees what it would have seen. Every text
    comes once before any comes again, and every token but its first counts.
    """

    def __init__(self, data: Sequence[Encoded], pad_token_id: int, seed: int):
        self.data = [Encoded(one.input_ids, [False, *[True] * (len(one) - 1)]) for one in data]
        self.seed, self._collate = seed, Collator(pad_token_id)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Collate batch *number*, from 0."""
        first = number * REPLAYED_AT_ONCE
        return self._collate([self._text(first + i) for i in range(REPLAYED_AT_ONCE)])

    def _text(self, position: int) -> Encoded:
        again, index = divmod(position, len(self.data))
        order = list(range(len(self.data)))
        random.Random(f"{self.seed} {again}").shuffle(order)
        return self.data[order[index]]


class Objective:
    """
    Run batches and weigh what the forward passes recorded; *replay* is anchor text. TrainingError:
    a cache smaller than what one token needs, or a replay term without text.
    """

    def __init__(
        self, routers: list[Router], settings: FinetuneSettings, replay: Replay | None = None
    ):
        self.settings, self.replay = settings, replay
        self.recorder = RoutingRecorder(routers)
        self._base = BaseRouters(routers) if settings.lambda_rank > 0 else None
        self.next_replayed = 0  # batch of anchor text on this device
        for router in routers:
            if router.top_k is not None:
                self._capacity(router, int(router.top_k))
        if settings.lambda_replay > 0 and replay is None:
            raise TrainingError(
                "lambda_replay is above 0 but there is no anchor text; give some, or set it to 0"
            )

    def measure(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        denominator: Tensor | float | None = None,
        *,
        training: bool,
    ) -> Terms:
        """
        Run the model, which may be wrapped, on a collated *batch*, beside anchor text if
        *training*. *denominator*: completion tokens of the whole optimiser step; default: of this
        batch. UnsupportedModelError: the model gives no logits, or routers ran without experts.
        """
        settings, labels = self.settings, batch["labels"]
        # Never 0: a process may get a batch in which nothing is to be learned.
        count = (labels != IGNORED).sum().clamp(min=1) if denominator is None else denominator
        # The loss is computed here and not by the model: some families divide by their own count of
        # tokens, shift labels in their own way, or add a load-balancing loss.
        with self.recorder:
            nll = _next_token_loss(model, batch, count)
            routings = self.recorder.take()
        more = {}
        if training and self.replay is not None and settings.lambda_replay > 0:
            replayed = self.replay.batch(self.next_replayed)
            self.next_replayed += 1
            replayed = {key: value.to(labels.device) for key, value in replayed.items()}
            # The batch's share of the step, so that batches and devices add up to one mean.
            share = (labels != IGNORED).sum() / count
            more["replay"] = _next_token_loss(model, replayed) * share
        return self.weigh(nll, routings, labels, count, more)

    def weigh(
        self,
        nll: Tensor,
        routings: Sequence[Routing],
        labels: Tensor,
        denominator: Tensor | float | None = None,
        more: dict[str, Tensor] | None = None,
    ) -> Terms:
        """Combine a batch's mean next-token loss with its layers' locality terms, and *more*."""
        settings = self.settings
        locality = self._locality(routings, labels, denominator)
        values = {"nll": nll, **locality, **(more or {})}
        weights = {
            "nll": 1.0,
            "cache": settings.lambda_cache,
            "rank": settings.lambda_rank,
            "concentration": settings.lambda_concentration,
            "replay": settings.lambda_replay,
        }
        total = nll
        for name, value in values.items():
            # Not 0 times a term that is only watched: it may be infinite.
            if name != "nll" and weights[name]:
                total = total + weights[name] * value
        return Terms(values, total)

    def _locality(
        self, routings: Sequence[Routing], labels: Tensor, denominator: Tensor | float | None
    ) -> dict[str, Tensor]:
        """Compute the terms of the routers, layers of one shape as one tensor."""
        settings, completion = self.settings, completion_positions(labels != IGNORED)
        groups: dict[tuple[int, ...], list[Routing]] = {}
        for one in routings:
            shape = (one.router.num_experts, one.logits.shape[-1], one.top_k_index.shape[-1])
            groups.setdefault(shape, []).append(one)
        found: dict[str, list[Tensor]] = {"cache": []}  # by term, layers of a shape together

        def stack(by_layer: list[Tensor]) -> Tensor:  # (batch, tokens, layers, ...)
            stacked = torch.stack(by_layer, dim=1)
            return stacked.view(*labels.shape, *stacked.shape[1:])

        for (num_experts, _, top_k), group in groups.items():
            logits = stack([one.logits for one in group])
            chosen = stack([one.top_k_index for one in group])
            capacity = self._capacity(group[0].router, top_k)
            given = (logits, chosen, completion)
            sizes: dict[str, Any] = {
                "capacity": capacity, "num_experts": num_experts, "denominator": denominator,
            }  # fmt: skip
            with nullcontext() if settings.lambda_cache else torch.no_grad():
                form: Any = settings.cache_loss
                lacks = cache_simulation_loss(*given, gamma=settings.gamma, form=form, **sizes)
                found["cache"].append(lacks)
            if self._base is not None:
                base = stack([self._base.logits(one) for one in group])
                rank = rank_matching_loss(
                    logits, base, completion, rho=settings.rho, denominator=denominator
                )
                found.setdefault("rank", []).append(rank)
            if settings.lambda_concentration > 0:
                found.setdefault("concentration", []).append(concentration_loss(*given, **sizes))
        return {name: torch.cat(by_shape).mean() for name, by_shape in found.items()}

    def _capacity(self, router: Router, top_k: int) -> int:
        """Experts that a layer's imagined cache holds; an error where one token needs more."""
        share, total = self.settings.capacity, router.num_experts
        capacity = experts_in_share(share, total)
        if capacity < top_k:
            raise TrainingError(
                f"a capacity of {share} is {capacity} of {total} experts, fewer than the {top_k} "
                f"that each token uses; raise it to {top_k / total:.3g} or more"
            )
        return capacity


def _next_token_loss(model: nn.Module, batch: dict[str, Any], count: Any = None) -> Tensor:
    made = run_to_head(model, batch)
    if made.states.shape[:-1] != batch["labels"].shape:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives logits for other positions than its input's, so it "
            "has no next-token loss to train on; use a family that predicts the next token"
        )
    return next_token_loss(
        made.states, batch["labels"], made.head, made.vocabulary,
        ignored=IGNORED, denominator=count,
    )  # fmt: skip
