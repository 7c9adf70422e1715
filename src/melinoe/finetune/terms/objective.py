"""
The training objective: next-token loss plus the weighted locality terms of every MoE layer.

Terms whose weight is 0 are computed too, without gradient, where they cost little: so a control
shows its cache loss beside the fine-tuned model's. Reuse, and what learns from a teacher or from
anchor text, are computed only if they weigh something; and for an anchor that weighs nothing no
pass of the base model is run, so one that refers to such a pass stays 0 in the log.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from melinoe.config import FinetuneSettings
from melinoe.data import IGNORED
from melinoe.errors import TrainingError
from melinoe.finetune.terms.base_pass import BaseOutputs, Switchable, base_pass
from melinoe.finetune.terms.batch_terms import Layout, Terms, stacks_of, weighing
from melinoe.finetune.terms.capacity import ImaginedCaches
from melinoe.finetune.terms.replay import Replay, to_device
from melinoe.finetune.terms.teacher import Teacher
from melinoe.losses import completion_positions, distillation_loss, match_loss
from melinoe.moe.base_routers import BaseRouters
from melinoe.moe.hidden import HiddenRecorder
from melinoe.moe.routing import Router, Routing, RoutingRecorder
from melinoe.moe.under_prior import PriorRouting, Texts


class Objective:
    """
    Weighs what a forward pass recorded.

    Args:
        routers: Of the model before training; their weights now are the base router's.
        settings: The weights and forms of the terms.
        updates: Of the experts, for passes of the base model; may be set later.
        replay: Anchor text; without it there is no replay term.
        teacher: Whose words and hidden states are learned, where a term asks for them; may be set
            later. ``None``: the base model's.
        prior: Changes choices while a batch is trained on; may be set later.

    Attributes:
        lambda_cache: Weight of the cache term; may be changed between steps.
        caches: The imagined caches, and how far the run has come.
        recorder: Sees the passes of `measure`.

    Raises:
        TrainingError: a cache smaller than what one token needs, settings of layers that are not
            the model's, or a replay term without text.
    """

    def __init__(
        self,
        routers: list[Router],
        settings: FinetuneSettings,
        *,
        updates: Switchable | None = None,
        replay: Replay | None = None,
        teacher: Teacher | None = None,
        prior: PriorRouting | None = None,
    ):
        self.settings, self.updates, self.replay = settings, updates, replay
        self.teacher, self.prior = teacher, prior
        self.lambda_cache = settings.lambda_cache
        self.caches = ImaginedCaches(routers, settings)
        self.base = BaseRouters(routers)
        self.recorder = RoutingRecorder(routers)
        self._batch_number = 0
        if settings.lambda_replay > 0 and replay is None:
            raise TrainingError(
                "lambda_replay is above 0 but there is no anchor text; give some, or set it to 0"
            )

    # ---- one batch, all passes that its terms need ----

    def begin_step(self, step: int, steps: int, first_batch: int = 0) -> None:
        """
        Say where the run stands, before the passes of an optimiser step.

        Args:
            step: Optimiser steps done.
            steps: Of the whole run.
            first_batch: Number of the next batch of anchor text on this device.
        """
        self.caches.progress = min(1.0, step / max(1, steps))
        self._batch_number = first_batch

    def measure(
        self,
        model: Any,
        inputs: dict[str, Any],
        forward: Callable[[], tuple[Tensor, Any]],
        denominator: Tensor | float | None = None,
        *,
        training: bool = True,
    ) -> tuple[Terms, Any]:
        """
        Run a batch, and whatever other passes the terms need, and weigh it.

        Args:
            model: As *forward* runs it.
            inputs: The batch, with ``labels`` and ``segment_ids``.
            forward: Gives the mean next-token loss with its graph, and the outputs with ``logits``.
            denominator: Completion tokens of the whole step; default: of this batch.
            training: Whether anchor text is replayed beside the batch, choices are made under the
                prior, and the imagined cache has the size of this point of the run; else there is
                no such text, choices are the routers' own, and it has its final size.
        """
        if not training:
            progress, self.caches.progress = self.caches.progress, 1.0
            try:
                return self._measure(model, inputs, forward, denominator, training=False)
            finally:
                self.caches.progress = progress
        return self._measure(model, inputs, forward, denominator, training=True)

    def _measure(
        self,
        model: Any,
        inputs: dict[str, Any],
        forward: Callable[[], tuple[Tensor, Any]],
        denominator: Tensor | float | None,
        *,
        training: bool,
    ) -> tuple[Terms, Any]:
        base = self.base_pass(model, inputs)
        taught = self.teacher_pass(model, inputs, base)
        hidden = self._hidden(model)
        labels = inputs["labels"]
        under = self._under_prior(inputs) if training else nullcontext()
        with under, self.recorder, hidden or nullcontext():
            nll, outputs = forward()
            routings = self.recorder.take()
        more = {}
        if taught is not None and self.settings.lambda_distill > 0:
            more["distill"] = distillation_loss(
                outputs["logits"] if isinstance(outputs, dict) else outputs.logits,
                taught.logits,
                labels,
                ignored=IGNORED,
                denominator=denominator,
            )
        if taught is not None and hidden is not None:
            more["match"] = match_loss(
                hidden.take(),
                taught.hidden,
                completion_positions(labels != IGNORED),
                denominator=denominator,
            )
        if training and self.settings.lambda_replay > 0:
            # The batch's share of the step, so that batches and devices add up to one mean.
            share = 1.0 if denominator is None else (labels != IGNORED).sum() / denominator
            more["replay"] = self._replayed(model, labels.device) * share
        terms = self(
            nll, routings, labels, inputs["segment_ids"], denominator, base=base, more=more
        )
        return terms, outputs

    def base_pass(self, model: Any, inputs: dict[str, Any]) -> BaseOutputs | None:
        """What the base model says about a batch, where an anchor that weighs something asks."""
        settings = self.settings
        if settings.reference != "pass" or settings.anchor == "none" or not settings.lambda_rank:
            return None
        hidden = None if self.teacher is not None else self._hidden(model)
        return base_pass(model, inputs, self.base, self.updates, hidden)

    def teacher_pass(
        self, model: Any, inputs: dict[str, Any], base: BaseOutputs | None = None
    ) -> BaseOutputs | None:
        """What the teacher says about a batch, where a term asks; without one, *base* if given."""
        if not self.settings.is_taught:
            return None
        if self.teacher is None:
            if base is not None:
                return base
            return base_pass(model, inputs, self.base, self.updates, self._hidden(model))
        return base_pass(model, inputs, self.teacher.routers, self.teacher, self._hidden(model))

    def _hidden(self, model: Any) -> HiddenRecorder | None:
        """A recorder of hidden states, where they are wanted; of the model within any wrapper."""
        if not self.settings.lambda_match > 0:
            return None
        return HiddenRecorder(self.base.routers, getattr(model, "module", model))

    def _under_prior(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Choices of this batch's completions as decoding with the cache prior would make them."""
        if self.prior is None:
            return nullcontext()
        capacity = {one.index: self.caches.final(one) for one in self.recorder.routers}
        completion = inputs["labels"] != IGNORED
        return self.prior.during(Texts(inputs["segment_ids"], completion, capacity))

    def _replayed(self, model: Any, device: torch.device) -> Tensor:
        """The loss on the next batch of anchor text."""
        assert self.replay is not None
        batch = to_device(self.replay.batch(self._batch_number), device)
        self._batch_number += 1
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "segment_ids")}
        if self.settings.replay_loss == "kl":
            base = base_pass(model, inputs, self.base, self.updates)
            logits = model(**inputs, use_cache=False).logits
            return distillation_loss(logits, base.logits, batch["labels"], ignored=IGNORED)
        logits = model(**inputs, use_cache=False).logits
        return ForCausalLMLoss(logits, batch["labels"], vocab_size=logits.shape[-1])

    # ---- the terms ----

    def __call__(
        self,
        nll: Tensor,
        routings: list[Routing],
        labels: Tensor,
        segment_ids: Tensor,
        denominator: Tensor | float | None = None,
        *,
        base: BaseOutputs | None = None,
        more: dict[str, Tensor] | None = None,
    ) -> Terms:
        """
        Combine a batch's next-token loss with its locality terms.

        Args:
            nll: Mean next-token loss, with gradient.
            routings: What each layer recorded in the pass that gave *nll*.
            labels: int64 ``(batch, tokens)``, -100 on prompt and padding.
            segment_ids: int64 ``(batch, tokens)``, as the collators of `melinoe.data` give it.
            denominator: Completion tokens of the whole step; default: of this batch.
            base: What the base model said, where the anchor refers to its own pass.
            more: Terms from other passes, weighed by their names in the settings.

        Raises:
            ValueError: the anchor refers to a pass of the base model, and there is none.
        """
        settings = self.settings
        anchored = settings.anchor != "none" and settings.lambda_rank > 0
        if anchored and settings.reference == "pass" and base is None:
            raise ValueError('reference="pass" needs what the base model said')
        layout = Layout.of(labels != IGNORED, segment_ids, settings, denominator)
        by_layer: dict[str, list[Tensor]] = {"cache": [], "anchor": [], "reuse": []}
        for stack in stacks_of(routings, layout):
            capacities = [
                self.caches.capacity_of(one.router, stack.top_k) for one in stack.routings
            ]
            weight = self._layer_weights(stack.routings)
            with weighing(self.lambda_cache):
                cache = stack.cache(capacities, settings)
                by_layer["cache"].append(cache if weight is None else cache * weight)
            if settings.lambda_reuse > 0:
                reuse = stack.reuse()
                by_layer["reuse"].append(reuse if weight is None else reuse * weight)
            if settings.anchor != "none" and (settings.reference != "pass" or base is not None):
                with weighing(settings.lambda_rank):
                    base_logits = self._base_logits(stack.routings, base)
                    by_layer["anchor"].append(stack.anchor(base_logits, settings))
        zero = nll.new_zeros(())
        means = {k: torch.cat(v).mean() if v else zero for k, v in by_layer.items()}
        more = dict(more or {})
        if settings.lambda_reuse > 0:
            more["reuse"] = means["reuse"]
        weights = {
            "nll": 1.0,
            "cache": self.lambda_cache,
            "anchor": settings.lambda_rank,
            **{name: float(getattr(settings, f"lambda_{name}")) for name in more},
        }
        terms = Terms(nll, means["cache"], means["anchor"], nll, more, weights)
        for name, value in terms.parts().items():
            # Not 0 times a term that is only watched: it may be infinite.
            if name != "nll" and weights[name]:
                terms.total = terms.total + weights[name] * value
        return terms

    def _base_logits(self, routings: Sequence[Routing], base: BaseOutputs | None) -> list[Tensor]:
        if base is not None and self.settings.reference == "pass":
            return [base.router_logits[one.router.index] for one in routings]
        return [self.base.logits(one) for one in routings]

    def _layer_weights(self, routings: Sequence[Routing]) -> Tensor | None:
        weights = self.settings.layer_weight
        if weights is None:
            return None
        own = [weights[self.caches.place[one.router.index]] for one in routings]
        return torch.tensor(own, device=routings[0].logits.device)
