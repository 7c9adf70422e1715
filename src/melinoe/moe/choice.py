"""
Cache-aware choice: let a resident expert stand in for a missing one that matters little.

This changes what the model computes, so it is off by default, and its cost in perplexity must be
measured beside what it saves. Only decoding is touched: a prompt's tokens need nearly all experts
anyway, and its experts are loaded once.

    cache-prior   rank experts by z + strength * spread * resident, where z are the router's logits
                  and spread is the running mean of max(z) - min(z) in that layer, over decoded
                  tokens; the first *keep* choices of the router stay. Source: arXiv:2412.00099.

A resident expert takes a missing one's place, or nothing happens. Where a router chooses by more
than its logits (correction biases, groups), an expert that it did not choose counts for hardly more
than the least of those it did.

Weights of a changed choice follow the router's own rule on the unchanged logits; a token whose
choice stays keeps its weights bit for bit. Nearly all families follow

    weight_k = scale * f(z)_k                      for some, and
    weight_k = scale * f(z)_k / sum_chosen f(z)    for others.

Which one holds is read off the tokens that pass by (`find_weighting`), the prompt's included. Until
two have passed nothing is changed, since one alone fits several rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from melinoe.errors import AttachError, UnsupportedModelError

KINDS = ("exact", "cache-prior")
_MEMORY = 0.99  # of the running mean of the logits' spread, per token
_EVIDENCE = 64  # tokens that the rule of the weights is read off


@dataclass(frozen=True)
class ChoiceSettings:
    """
    How choices are changed if a chosen expert is not resident; by default they are not.

    The price of cache-prior: docs/findings.md#what-cache-aware-choice-costs.

    *kind* is ``exact`` (nothing is changed) or ``cache-prior``, *strength* its lambda, 0 or more;
    *keep* of a token's choices, the most wanted ones, always stay. AttachError where they mean
    nothing.
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
    Changes the choices of one layer's router, given which experts are resident. Logits beyond
    *num_experts* are skip slots and left alone; *changed* counts replaced choices.
    """

    def __init__(self, settings: ChoiceSettings, num_experts: int) -> None:
        self.settings, self.num_experts = settings, num_experts
        self.weighting: Weighting | None = None
        self.changed = 0
        self._spread: float | None = None
        self._evidence: list[Tensor] = []

    def reset(self) -> None:
        """Forget the spread of earlier tokens: the next text is decoded as if it came first."""
        self._spread = None

    def observe(self, logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Learn from the weights that a router gave, and change nothing."""
        self._learn(logits[:_EVIDENCE], top_k_index[:_EVIDENCE], top_k_weights[:_EVIDENCE])

    def __call__(
        self, logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor, resident: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Replace choices *top_k_index*, int64 ``(tokens, top_k)``, and return choices and weights.

        *logits* are the router's ``(tokens, num_logits)``; *resident*, bool ``(num_experts,)``, is
        as before this request. A token with an id outside the experts is left alone.
        UnsupportedModelError if the router's weights follow no known rule.
        """
        whole = self._learn(logits, top_k_index, top_k_weights)
        if self.weighting is None or not self.settings.strength or not bool(whole.any()):
            return top_k_index, top_k_weights
        scores = logits[:, : self.num_experts].float()
        wanted = self._prior(scores, top_k_index.clamp(0, self.num_experts - 1), resident)
        # Who stays, stays in its place: only newcomers take the places of those who leave.
        index = _in_place(top_k_index, wanted)
        moved = (index != top_k_index).any(-1) & whole
        if not bool(moved.any()):
            return top_k_index, top_k_weights
        index = torch.where(moved[:, None], index, top_k_index)
        self.changed += int((index != top_k_index).sum())
        weights = self.weighting.weights(logits, index.clamp(0, logits.shape[-1] - 1))
        weights = weights.to(top_k_weights.dtype)
        return index, torch.where(moved[:, None], weights, top_k_weights)

    def _learn(self, logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Find or check the rule of the weights; bool ``(tokens,)``: chose experts throughout."""
        whole = ((top_k_index >= 0) & (top_k_index < self.num_experts)).all(-1)
        if not bool(whole.any()):
            return whole
        now = (logits[whole], top_k_index[whole], top_k_weights[whole])
        # Checked each time: a wrong rule must not go unseen.
        fits = self.weighting is not None and self.weighting.gives(*now)
        before = self._evidence
        if not fits or len(before[0]) < _EVIDENCE:
            seen = [one[:_EVIDENCE].detach().clone() for one in now]
            seen = [torch.cat(pair) for pair in zip(before, seen, strict=True)] if before else seen
            self._evidence = seen
            if not fits and len(seen[0]) > 1:
                self.weighting = find_weighting(seen[0], seen[1], seen[2])
        return whole

    def _prior(self, scores: Tensor, chosen: Tensor, resident: Tensor) -> Tensor:
        """Rank experts by the cache prior; the best ``(tokens, top_k)``, in no order."""
        spread = (scores.amax(-1) - scores.amin(-1)).mean().item()
        memory = _MEMORY ** len(scores) if self._spread is not None else 0.0
        self._spread = memory * (self._spread or 0.0) + (1 - memory) * spread
        of_chosen = scores.gather(-1, chosen)
        gain = self.settings.strength * self._spread
        # Above the least of the chosen, only the order counts: the router preferred that one.
        over = (scores - of_chosen.amin(-1, keepdim=True)).clamp(min=0)
        ranked = torch.where(resident, scores - 0.999 * over + gain, -float("inf"))
        # Chosen experts stay that are resident, or among the *keep* most wanted.
        keep = min(self.settings.keep, chosen.shape[-1])
        first = chosen.gather(-1, of_chosen.topk(keep, dim=-1).indices)
        stays = (chosen[:, :, None] == first[:, None, :]).any(-1)
        stays |= resident.expand_as(scores).gather(-1, chosen)
        kept = torch.where(stays, float("inf"), of_chosen)
        return ranked.scatter(-1, chosen, kept).topk(chosen.shape[-1], dim=-1).indices


def _in_place(before: Tensor, wanted: Tensor) -> Tensor:
    """Order *wanted* so that every expert that was chosen before keeps its column."""
    stays = (before[:, :, None] == wanted[:, None, :]).any(-1)
    is_new = ~(wanted[:, :, None] == before[:, None, :]).any(-1)
    # The nth free place takes the nth newcomer, in their order of rank.
    order = torch.argsort((~is_new).int(), dim=-1, stable=True)
    nth = (~stays).long().cumsum(-1) - 1
    return torch.where(stays, before, wanted.gather(-1, order).gather(-1, nth.clamp(min=0)))


# --- weights of a changed choice ----------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt-softplus": lambda z: F.softplus(z).sqrt(),
    "softplus": F.softplus,
}


class Weighting(NamedTuple):
    """The rule by which a router makes weights of logits: scale f(logit), over their sum or not."""

    function: str
    normalised: bool
    scale: float

    def weights(self, logits: Tensor, index: Tensor) -> Tensor:
        """Compute the float32 weights of any choice *index* ``(tokens, top_k)`` of the logits."""
        values = _FUNCTIONS[self.function](logits.float()).gather(-1, index)
        if self.normalised:
            values = values / values.sum(-1, keepdim=True).clamp(min=1e-20)
        return self.scale * values

    def gives(self, logits: Tensor, index: Tensor, weights: Tensor) -> bool:
        """Tell whether the rule gives these weights, up to the rounding of their type."""
        return self.error(logits, index, weights) <= _tolerance(weights)

    def error(self, logits: Tensor, index: Tensor, weights: Tensor) -> float:
        """Largest distance between the rule and *weights*, as a share of the latter."""
        observed = weights.float()
        error = (observed - self.weights(logits, index)).abs()
        return float((error / observed.abs().clamp(min=1e-3)).max())


def find_weighting(logits: Tensor, index: Tensor, weights: Tensor) -> Weighting:
    """Find the rule by which a router gave *weights* to *index*, or refuse."""
    tolerance, total = _tolerance(weights), weights.float().sum()
    rules = []
    for name in _FUNCTIONS:
        for normalised in (False, True):
            sums = Weighting(name, normalised, 1.0).weights(logits, index).sum()
            scale = _plain(float(total / sums.clamp(min=1e-20)), tolerance / 20)
            rules.append(Weighting(name, normalised, scale))
    errors = [rule.error(logits, index, weights) for rule in rules]
    if min(errors) <= tolerance:
        return rules[errors.index(min(errors))]
    raise UnsupportedModelError(
        "this model's routers weigh experts by a rule that is not known here, so its choices "
        'cannot be changed; serve it with choice="exact"'
    )


def _tolerance(weights: Tensor) -> float:
    """Rounding of the weights' own type, and of a router that computes in it."""
    return 2e-4 if weights.dtype == torch.float32 else 3e-2


def _plain(scale: float, tolerance: float) -> float:
    """Round *scale* to the fewest digits within *tolerance*: configs say 2.5 or 1."""
    shorter = (float(f"{scale:.{digits}g}") for digits in range(1, 5))
    return next((s for s in shorter if abs(s - scale) <= tolerance * abs(scale)), scale)
