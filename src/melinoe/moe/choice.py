"""
Cache-aware choice: let a resident expert stand in for a missing one that matters little.

This changes what the model computes, so it is off by default, has a name, and its cost in
perplexity must be measured beside what it saves. Only decoding is touched: a prompt's tokens need
nearly all experts anyway, and its experts are loaded once.

    cache-prior   rank experts by z + strength * spread * resident, where z are the router's logits
                  and spread is the running mean of max(z) - min(z) in that layer, over decoded
                  tokens; the first *keep* choices of the router stay. Source: arXiv:2412.00099.

A resident expert takes a missing one's place or nothing happens. Where a
router chooses by more than its logits (correction biases, groups), the cache prior counts an
expert that it did not choose for hardly more than the least of those it did.

Weights of a changed choice follow the router's own rule on the unchanged logits (see `weighting`);
a token whose choice stays keeps its weights bit for bit. The rule is read off the tokens that pass
by, the prompt's included; until two have, nothing is changed, since one alone fits several rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from melinoe.errors import AttachError
from melinoe.moe.weighting import Weighting, find_weighting

KINDS = ("exact", "cache-prior")
_MEMORY = 0.99  # of the running mean of the logits' spread, per token
_EVIDENCE = 64  # tokens that the rule of the weights is read off


@dataclass(frozen=True)
class ChoiceSettings:
    """
    What is done about a chosen expert that is not resident.

    Attributes:
        kind: ``exact`` (nothing) or ``cache-prior``.
        strength: lambda of the cache prior, 0 or more.
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
        if not 0 <= self.strength < float("inf"):
            raise AttachError(
                f"a strength of {self.strength} means nothing for {self.kind}; it must be 0 or more"
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
        self._evidence: tuple[Tensor, Tensor, Tensor] | None = None

    def reset(self) -> None:
        """Forget the spread of earlier tokens, so that a text is decoded as if it came first."""
        self._spread = None

    def observe(self, logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """
        See what a router gave its choices, and change nothing; arguments as for the call.

        Raises:
            UnsupportedModelError: the router's weights follow no known rule.
        """
        some = (logits[:_EVIDENCE], top_k_index[:_EVIDENCE], top_k_weights[:_EVIDENCE])
        self._learn(*some, self._whole(some[1]))

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
        whole = self._whole(top_k_index)
        known = self._learn(logits, top_k_index, top_k_weights, whole)
        if known is None or not self.settings.strength:
            return top_k_index, top_k_weights
        scores = logits[:, : self.num_experts].float()
        wanted = self._prior(scores, top_k_index.clamp(0, self.num_experts - 1), resident)
        # Who stays, stays in its place: only newcomers take the places of those who leave.
        index = self._in_place(top_k_index, wanted)
        moved = (index != top_k_index).any(-1) & whole
        if not bool(moved.any()):
            return top_k_index, top_k_weights
        index = torch.where(moved[:, None], index, top_k_index)
        self.changed += int((index != top_k_index).sum())
        weights = known.weights(logits, index.clamp(0, logits.shape[-1] - 1))
        weights = weights.to(top_k_weights.dtype)
        return index, torch.where(moved[:, None], weights, top_k_weights)

    def _whole(self, top_k_index: Tensor) -> Tensor:
        """Bool ``(tokens,)``: which tokens chose an expert in every place."""
        return ((top_k_index >= 0) & (top_k_index < self.num_experts)).all(-1)

    def _learn(
        self, logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor, whole: Tensor
    ) -> Weighting | None:
        """The rule of the weights, held against these tokens too; None where it is not known."""
        if not bool(whole.any()):
            return None
        now = (logits[whole], top_k_index[whole], top_k_weights[whole])
        # Held against what the router gave, each time: a wrong rule must not go unseen.
        fits = self.weighting is not None and self.weighting.gives(*now)
        before = self._evidence
        if not fits or before is None or len(before[0]) < _EVIDENCE:
            room = [one[:_EVIDENCE].detach().clone() for one in now]
            seen = (
                room if before is None else [torch.cat(p) for p in zip(before, room, strict=True)]
            )
            self._evidence = (seen[0], seen[1], seen[2])
            if not fits and len(seen[0]) > 1:
                self.weighting = find_weighting(*self._evidence)
        return self.weighting

    def _prior(self, scores: Tensor, chosen: Tensor, resident: Tensor) -> Tensor:
        spread = (scores.amax(-1) - scores.amin(-1)).mean().item()
        memory = _MEMORY ** len(scores) if self._spread is not None else 0.0
        self._spread = memory * (self._spread or 0.0) + (1 - memory) * spread
        least = scores.gather(-1, chosen).amin(-1, keepdim=True)
        gain = self.settings.strength * self._spread
        # Above the least of the chosen, only the order counts: the router preferred that one.
        over = (scores - least).clamp(min=0)
        ranked = torch.where(resident, scores - 0.999 * over + gain, -float("inf"))
        stays = self._stays(scores, chosen, resident)
        kept = torch.where(stays, float("inf"), scores.gather(-1, chosen))
        return ranked.scatter(-1, chosen, kept).topk(chosen.shape[-1], dim=-1).indices

    def _stays(self, scores: Tensor, chosen: Tensor, resident: Tensor) -> Tensor:
        """Bool, as *chosen*: who is resident, or among the *keep* most wanted by logit."""
        keep = min(self.settings.keep, chosen.shape[-1])
        first = chosen.gather(-1, scores.gather(-1, chosen).topk(keep, dim=-1).indices)
        is_first = (chosen[:, :, None] == first[:, None, :]).any(-1)
        return is_first | resident.expand_as(scores).gather(-1, chosen)

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
