"""
Cache-aware choice: let a resident expert stand in for a missing one that matters little.

This changes what the model computes, so it is off by default, has a name, and its cost in
perplexity must be measured beside what it saves. Only decoding is touched: a prompt's tokens need
nearly all experts anyway, and its experts are loaded once.

    cache-prior   rank experts by z + strength * spread * resident, where z are the router's logits
                  and spread is the running mean of max(z) - min(z) in that layer; the first *keep*
                  choices of the router stay. Source: arXiv:2412.00099.
    reroute       a missing choice is replaced by the most probable resident expert not chosen yet
                  whose probability is at least (1 - strength) times that of the token's first
                  choice; the first *keep* choices stay. Source: arXiv:2608.18261.

Weights of a changed choice follow the router's own rule on the unchanged logits (see `weighting`);
a token whose choice stays keeps its weights bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from melinoe.errors import AttachError
from melinoe.moe.weighting import Weighting, find_weighting

KINDS = ("exact", "cache-prior", "reroute")
_MEMORY = 0.99  # of the running mean of the logits' spread, per token


@dataclass(frozen=True)
class ChoiceSettings:
    """
    What is done about a chosen expert that is not resident.

    Attributes:
        kind: ``exact`` (nothing), ``cache-prior`` or ``reroute``.
        strength: lambda of the cache prior, 0 or more; tau of rerouting, in [0, 1].
        keep: The router's first so many choices of a token always stay.

    Raises:
        AttachError: a value that means nothing.
    """

    kind: str = "exact"
    strength: float = 0.0
    keep: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AttachError(f"there is no choice {self.kind!r}; take one of {', '.join(KINDS)}")
        highest = 1.0 if self.kind == "reroute" else float("inf")
        if not 0 <= self.strength <= highest:
            raise AttachError(
                f"a strength of {self.strength} means nothing for {self.kind}; it must be 0 or "
                f"more{' and at most 1' if self.kind == 'reroute' else ''}"
            )
        if self.keep < 0:
            raise AttachError(f"keep cannot be {self.keep}; it is a number of choices, 0 or more")


class CacheAwareChoice:
    """
    Changes the choices of one layer's router, given who is resident.

    Args:
        settings: Kind and strength; not ``exact``.
        num_experts: Experts of the layer; logits beyond them are skip slots and left alone.
    """

    def __init__(self, settings: ChoiceSettings, num_experts: int) -> None:
        self.settings, self.num_experts = settings, num_experts
        self.weighting: Weighting | None = None
        self.changed = 0  # choices replaced so far
        self._spread: float | None = None

    def __call__(
        self, logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor, resident: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        The choices to run.

        Args:
            logits: ``(tokens, num_logits)`` of the router, for the same tokens.
            top_k_index: int64 ``(tokens, top_k)``, the router's choice; ids outside the experts
                mean none, and a token that has one is left alone.
            top_k_weights: ``(tokens, top_k)``.
            resident: bool ``(num_experts,)`` before this request, on the same device.

        Returns:
            Choices and weights, of the same shapes and types.

        Raises:
            UnsupportedModelError: the router's weights follow no known rule.
        """
        whole = ((top_k_index >= 0) & (top_k_index < self.num_experts)).all(-1)
        if not bool(whole.any()):
            return top_k_index, top_k_weights
        # Held against what the router gave, each time: a wrong rule must not go unseen.
        if self.weighting is None or not self.weighting.gives(
            logits[whole], top_k_index[whole], top_k_weights[whole]
        ):
            self.weighting = find_weighting(logits[whole], top_k_index[whole], top_k_weights[whole])
        scores = logits[:, : self.num_experts].float()
        if self.settings.kind == "cache-prior":
            wanted = self._prior(scores, top_k_index.clamp(0, self.num_experts - 1), resident)
        else:
            wanted = self._reroute(scores, top_k_index.clamp(0, self.num_experts - 1), resident)
        # Who stays, stays in its place: only newcomers take the places of those who leave.
        index = self._in_place(top_k_index, wanted)
        moved = (index != top_k_index).any(-1) & whole
        if not bool(moved.any()):
            return top_k_index, top_k_weights
        index = torch.where(moved[:, None], index, top_k_index)
        self.changed += int((index != top_k_index).sum())
        weights = self.weighting.weights(logits, index.clamp(0, logits.shape[-1] - 1))
        weights = weights.to(top_k_weights.dtype)
        return index, torch.where(moved[:, None], weights, top_k_weights)

    def _prior(self, scores: Tensor, chosen: Tensor, resident: Tensor) -> Tensor:
        spread = (scores.amax(-1) - scores.amin(-1)).mean().item()
        before = self._spread
        self._spread = spread if before is None else _MEMORY * before + (1 - _MEMORY) * spread
        ranked = scores + self.settings.strength * self._spread * resident
        ranked = ranked.scatter(-1, self._first(scores, chosen), float("inf"))
        return ranked.topk(chosen.shape[-1], dim=-1).indices

    def _reroute(self, scores: Tensor, chosen: Tensor, resident: Tensor) -> Tensor:
        p = scores.softmax(-1)
        top = p.gather(-1, chosen).amax(-1, keepdim=True)
        is_chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, chosen, True)
        may_come = resident & ~is_chosen & (p >= (1 - self.settings.strength) * top)
        stays = resident.expand_as(p).gather(-1, chosen)
        first = self._first(scores, chosen)
        stays = stays | (chosen[:, :, None] == first[:, None, :]).any(-1)
        # Fixed order: those who stay; then newcomers by probability; then the missing ones.
        ranked = torch.where(may_come, 1 + p, -torch.ones_like(p))
        ranked = ranked.scatter(-1, chosen, torch.where(stays, 4.0, p.gather(-1, chosen)))
        return ranked.topk(chosen.shape[-1], dim=-1).indices

    def _first(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """The *keep* most wanted of the chosen, by logit: ``(tokens, keep)``."""
        keep = min(self.settings.keep, chosen.shape[-1])
        best = scores.gather(-1, chosen).topk(keep, dim=-1).indices
        return chosen.gather(-1, best)

    @staticmethod
    def _in_place(before: Tensor, wanted: Tensor) -> Tensor:
        """*wanted* as a set, with everyone who was chosen before in the same column as before."""
        stays = (before[:, :, None] == wanted[:, None, :]).any(-1)
        is_new = ~(wanted[:, :, None] == before[:, None, :]).any(-1)
        # The nth free place takes the nth newcomer, in their order of rank.
        order = torch.argsort((~is_new).int(), dim=-1, stable=True)
        newcomers = wanted.gather(-1, order)
        nth = (~stays).long().cumsum(-1) - 1
        return torch.where(stays, before, newcomers.gather(-1, nth.clamp(min=0)))
