"""
Train under cache-aware choice: completions run the experts that decoding them would run.

A model can learn with the cache prior (see `melinoe.moe.choice`): while it trains, each completion
token's choices are those that decoding token by token would make, given who would be resident. What
stands in for a missing expert then learns to do so, whether the model is served with the prior or
with its own choices. Weights of the experts follow the router's own rule on its unchanged logits,
with their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.errors import UnsupportedModelError
from melinoe.moe.choice import CacheAwareChoice, ChoiceSettings
from melinoe.moe.routing import Router, router_logits


@dataclass(frozen=True)
class Texts:
    """
    The texts of a batch.

    Attributes:
        segment_ids: int64 ``(batch, tokens)``, as the collators of `melinoe.data` give it.
        completion: bool, of the same shape: tokens that are decoded one by one; the others are
            prompts, and keep their choices.
        capacity: Slots of each layer, by the layer's index.
    """

    segment_ids: Tensor
    completion: Tensor
    capacity: dict[int, int]


class PriorRouting:
    """
    Stands between routers and experts of a model in training, from when it is made until `close`.

    Passes within `during` run changed choices, all others the routers' own. A backward pass that
    computes activations again runs what the forward pass ran.

    Args:
        routers: Of the model.
        strength: Of the prior, above 0.
        gamma: Decay of the imagined cache's LFU, in [0.001, 1].

    Attributes:
        strength: Of the prior.
        replaced: Choices replaced so far.
        uses: Choices of completion tokens so far.
    """

    def __init__(self, routers: Sequence[Router], strength: float, gamma: float) -> None:
        self.settings = ChoiceSettings(kind="cache-prior", strength=strength)
        self.strength = strength
        self.gamma = max(gamma, 0.001)  # where LFU is as good as LRU, and its scores still finite
        self.replaced = self.uses = 0
        self._texts: Texts | None = None
        self._known = {r.index: CacheAwareChoice(self.settings, r.num_experts) for r in routers}
        self._logits: dict[int, Tensor] = {}
        # What ran since the last batch began: choices as the router made them, and as they ran.
        self._ran: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._handles: list[Any] = []
        for router in routers:
            part = router.module.get_submodule(router.source)
            self._handles.append(part.register_forward_hook(self._see(router)))
            # Before whoever records the choice that runs.
            self._handles.append(
                router.experts.register_forward_pre_hook(
                    self._choose(router), with_kwargs=True, prepend=True
                )
            )

    @contextmanager
    def during(self, texts: Texts) -> Iterator[None]:
        """Within it, forward passes are of *texts*, and run changed choices."""
        self._texts = texts
        self._ran = {}
        try:
            yield
        finally:
            self._texts = None

    def close(self) -> None:
        """Let the routers decide alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see(self, router: Router) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._logits[router.index] = router_logits(output)

        return hook

    def _choose(self, router: Router) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            logits = self._logits.pop(router.index, None)
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            before, weights = given["top_k_index"], given["top_k_weights"]
            after = self._recalled(router, before)
            off = self._texts is None or not torch.is_grad_enabled()
            if after is None and off:
                return None
            if logits is None or logits.shape[0] != before.shape[0]:
                raise UnsupportedModelError(
                    f"{router.name} and its experts did not see the same tokens; train with "
                    "cache_prior 0"
                )
            if after is None:
                after = self._after(router, logits.detach(), before, weights.detach())
                self._ran.setdefault(router.index, []).append((before, after))
            rule = self._known[router.index].weighting
            moved = (after != before).any(-1, keepdim=True)
            if rule is not None:
                new = rule.weights(logits, after.clamp(0, logits.shape[-1] - 1))
                weights = torch.where(moved, new.to(weights.dtype), weights)
            given |= {"top_k_index": after, "top_k_weights": weights}
            return tuple(given.pop(name) for name in names), given

        return hook

    def _recalled(self, router: Router, before: Tensor) -> Tensor | None:
        """What ran when these choices came first, where a backward pass computes them again."""
        if torch._C._current_graph_task_id() < 0:
            return None
        for theirs, after in self._ran.get(router.index, ()):
            if theirs.shape == before.shape and torch.equal(theirs, before):
                return after
        return None

    def _after(self, router: Router, logits: Tensor, before: Tensor, weights: Tensor) -> Tensor:
        from melinoe.cache import prior_kernel

        assert self._texts is not None
        known, texts = self._known[router.index], self._texts
        if not bool((logits < float("inf")).all() & weights.isfinite().all()):
            return before  # no rule shows in what is not finite; whoever trains skips such a step
        try:
            known.observe(logits, before, weights)
        except UnsupportedModelError:
            raise UnsupportedModelError(
                f"{router.name} weighs experts by a rule that is not known here, so another "
                "expert's weight cannot be told; train with cache_prior 0"
            ) from None
        if known.weighting is None:  # too few tokens so far to tell the rule of the weights
            return before
        shape = texts.segment_ids.shape
        if len(before) != texts.segment_ids.numel():
            raise UnsupportedModelError(
                f"{router.name} chose for {len(before)} tokens of a batch of "
                f"{texts.segment_ids.numel()}, so it cannot be told which are decoded; train with "
                "cache_prior 0"
            )
        after = before.reshape(*shape, -1).cpu().numpy().copy()
        scores = logits[:, : router.num_experts].float().reshape(*shape, -1).cpu().numpy()
        replaced, uses = prior_kernel.choose(
            scores,
            after,
            texts.segment_ids.cpu().numpy(),
            texts.completion.cpu().numpy(),
            texts.capacity[router.index],
            self.gamma,
            self.settings.strength,
            self.settings.keep,
            prior_kernel.MEMORY,
        )
        self.replaced, self.uses = self.replaced + replaced, self.uses + uses
        return torch.from_numpy(after).to(before.device).view_as(before)
