"""
The training objective: next-token loss plus weighted terms over every MoE layer.

    nll      next-token loss on completion tokens
    cache    cache simulation: experts of a token that an imagined cache lacks
    concentration   few experts within a sequence, all of them over the batch
    anchor   distance from the base routers (rank matching or KL divergence)
    match    distance of hidden states from the teacher's
    replay   next-token loss on anchor text

The cache term is computed without gradient where its weight is 0, so that a control shows it beside
the fine-tuned model's. The others are computed only if they weigh something.
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
from melinoe.finetune.adapter import Teacher
from melinoe.finetune.parts import TrainedParts
from melinoe.losses import (
    CausalFilter,
    cache_simulation_loss,
    completion_positions,
    concentration_loss,
    kl_anchor_loss,
    match_loss,
    next_token_loss,
    rank_matching_loss,
)
from melinoe.moe.base_routers import BaseRouters
from melinoe.moe.routing import HiddenRecorder, Router, Routing, RoutingRecorder

_NOT_FOR_THE_MODEL = ("labels", "segment_ids", "num_items_in_batch")
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
    Batches of anchor text: text of other kinds whose quality training should keep.

    Seed and position in the run decide a batch, so a resumed run sees what it would have seen.
    Every text comes once before any comes again, in a new order each time.

    Every token of *data* but the first of a text counts, prompt or not.
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
    Run batches and weigh what the forward passes recorded.

    Args:
        routers: Of the model before training; their weights now are the base router's.
        settings: Weights and forms of the terms.
        parts: What is trained, switched off for passes of the base model.
        replay: Anchor text; needed where ``lambda_replay`` is above 0.
        teacher: Whose hidden states are learned; ``None``: the base model's.

    Raises:
        TrainingError: a cache smaller than what one token needs, or a replay term without text.
    """

    def __init__(
        self,
        routers: list[Router],
        settings: FinetuneSettings,
        *,
        parts: TrainedParts | None = None,
        replay: Replay | None = None,
        teacher: Teacher | None = None,
    ):
        self.settings, self.replay, self.teacher = settings, replay, teacher
        self.parts = parts or TrainedParts({}, {})
        self.base = BaseRouters(routers)
        self.recorder = RoutingRecorder(routers)
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
        Run the model on a batch, with the other passes that the terms need, and weigh the result.

        Args:
            model: Returns logits; may be wrapped for distributed training.
            batch: From a collator of `melinoe.data`, on the model's device.
            denominator: Completion tokens of the whole optimiser step; default: of this batch.
            training: Whether anchor text is replayed beside the batch.

        Raises:
            UnsupportedModelError: the model gives no logits, or routers ran without experts.
        """
        settings, labels = self.settings, batch["labels"]
        # Never 0: a process may get a batch in which nothing is to be learned.
        count = (labels != IGNORED).sum().clamp(min=1) if denominator is None else denominator
        hidden = None
        if settings.is_taught:
            hidden = HiddenRecorder(self.recorder.routers, getattr(model, "module", model))
            taught = self._taught(model, batch, hidden)
        # The loss is computed here and not by the model: some families divide by their own count of
        # tokens, shift labels in their own way, or add a load-balancing loss.
        with self.recorder, hidden or nullcontext():
            nll = _next_token_loss(model, batch, count)
            routings = self.recorder.take()
        more = {}
        if hidden is not None:
            positions = completion_positions(labels != IGNORED)
            more["match"] = match_loss(hidden.take(), taught, positions, denominator=count)
        if training and self.replay is not None and settings.lambda_replay > 0:
            replayed = self.replay.batch(self.next_replayed)
            self.next_replayed += 1
            replayed = {key: value.to(labels.device) for key, value in replayed.items()}
            # The batch's share of the step, so that batches and devices add up to one mean.
            share = (labels != IGNORED).sum() / count
            more["replay"] = _next_token_loss(model, replayed) * share
        return self.weigh(nll, routings, labels, batch["segment_ids"], count, more)

    def weigh(
        self,
        nll: Tensor,
        routings: Sequence[Routing],
        labels: Tensor,
        segment_ids: Tensor,
        denominator: Tensor | float | None = None,
        more: dict[str, Tensor] | None = None,
    ) -> Terms:
        """
        Combine a batch's mean next-token loss with its locality terms.

        Args:
            nll: With gradient.
            routings: What each layer recorded in the pass that gave *nll*.
            labels, segment_ids: int64 ``(batch, tokens)``, as the collators of `melinoe.data` give.
            denominator: As in `measure`.
            more: Terms from other passes.
        """
        settings = self.settings
        locality = self._locality(routings, labels, segment_ids, denominator)
        values = {"nll": nll, **locality, **(more or {})}
        weights = {
            "nll": 1.0,
            "cache": settings.lambda_cache,
            "concentration": settings.lambda_concentration,
            "anchor": settings.lambda_rank,
            "match": settings.lambda_match,
            "replay": settings.lambda_replay,
        }
        total = nll
        for name, value in values.items():
            # Not 0 times a term that is only watched: it may be infinite.
            if name != "nll" and weights[name]:
                total = total + weights[name] * value
        return Terms(values, total)

    def _locality(
        self,
        routings: Sequence[Routing],
        labels: Tensor,
        segment_ids: Tensor,
        denominator: Tensor | float | None,
    ) -> dict[str, Tensor]:
        """Compute the terms of the routers, layers of one shape as one tensor."""
        settings, completion = self.settings, completion_positions(labels != IGNORED)
        cache_filter = CausalFilter.of(segment_ids, settings.gamma)
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
            with nullcontext() if settings.lambda_cache else torch.no_grad():
                found["cache"].append(
                    cache_simulation_loss(
                        logits,
                        chosen,
                        completion,
                        cache_filter,
                        capacity=capacity,
                        num_experts=num_experts,
                        form=settings.cache_loss,  # type: ignore[arg-type]
                        denominator=denominator,
                    )
                )
            if settings.lambda_concentration > 0:
                found.setdefault("concentration", []).append(
                    concentration_loss(
                        logits,
                        chosen,
                        completion,
                        segment_ids,
                        capacity=capacity,
                        num_experts=num_experts,
                        denominator=denominator,
                    )
                )
            if settings.lambda_rank > 0:
                base = stack([self.base.logits(one) for one in group])
                given = (logits, base, completion)
                found.setdefault("anchor", []).append(
                    kl_anchor_loss(*given, denominator=denominator)
                    if settings.anchor == "kl"
                    else rank_matching_loss(*given, rho=settings.rho, denominator=denominator)
                )
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

    @torch.no_grad()
    def _taught(
        self, model: nn.Module, batch: dict[str, Any], hidden: HiddenRecorder
    ) -> dict[int, Tensor]:
        """Hidden states of the teacher, or of the base model, on a batch."""
        routers, updates = self.base, {}
        if self.teacher is not None:
            routers, updates = self.teacher.routers, self.teacher.updates
        with self.parts.replaced(updates), routers.in_place(), hidden:
            model_outputs(model, batch)
        return hidden.take()


def model_outputs(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Run the model on what it takes of a batch; without a key-value cache, which hides packing."""
    inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_THE_MODEL}
    return model(**inputs, use_cache=False)


def logits_of(model: nn.Module, outputs: Any) -> Tensor:
    """
    Return the next-token logits ``(batch, tokens, vocabulary)``.

    Raises:
        UnsupportedModelError: the model has none.
    """
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    if logits is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives hidden states but no logits, so it has no next-token "
            "loss to train on; load the class of its family that has a language-model head"
        )
    return logits


def _next_token_loss(model: nn.Module, batch: dict[str, Any], count: Any = None) -> Tensor:
    logits = logits_of(model, model_outputs(model, batch))
    if logits.shape[:-1] != batch["labels"].shape:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives logits for other positions than its input's, so it "
            "has no next-token loss to train on; use a family that predicts the next token"
        )
    return next_token_loss(logits, batch["labels"], ignored=IGNORED, denominator=count)
