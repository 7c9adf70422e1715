"""
The eviction rules of one layer that look at the past: lru, lfu, lfru, score, static.

Each rule orders all experts of the layer, resident or not, by one number; the lowest leaves, and of
equal ones the lowest id. That number never depends on the slots, which is what makes the rules
stack algorithms (see `melinoe.cache.curves`).
"""

import math
from collections.abc import Sequence
from typing import Any

from melinoe.cache.policy import Policy
from melinoe.errors import MelinoeError


class LRU(Policy):
    """
    Evict the expert whose last use is longest ago.

    Rule: a clock ticks once per expert served; an expert's stamp is the tick of its last use;
    the lowest stamp leaves. Experts of one request are stamped in the order listed, so of two
    last used together the lower id leaves first. No two stamps are equal.

    Source:
        The usual rule; for experts of one layer, arXiv:2312.17238.
    """

    name = "lru"

    def reset(self, num_experts: int) -> None:
        """Forget all uses."""
        self._clock = 0
        self._stamp = [-1] * num_experts

    def use(self, experts: Sequence[int]) -> None:
        """Stamp the experts in the order listed."""
        clock, stamp = self._clock, self._stamp
        for expert in experts:
            stamp[expert] = clock
            clock += 1
        self._clock = clock

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Lowest stamps first."""
        if count == 1:
            return (min(candidates, key=self._stamp.__getitem__),)
        return sorted(candidates, key=self._stamp.__getitem__)[:count]


class DecayedLFU(Policy):
    """
    Evict the expert used least, where old uses count less.

    Rule: with each request every score becomes ``gamma * score``, then each expert requested
    gains 1; the lowest score leaves, and of equal ones the lowest id. Scores outlive eviction.

    Scores are kept in a unit that grows by ``1 / gamma`` per request, which is the same without
    touching all of them. Near the end of the double range the unit and all scores are divided by
    the power of two in it, which rounds nothing;
    a score that falls below the smallest double this way counts as zero.

    Args:
        gamma: Decay per request, in [0.001, 1]; 1 counts uses without forgetting.

    Raises:
        ValueError: *gamma* is outside its range.

    Source:
        The cache of the training loss of arXiv:2602.11192 (closed form s <- gamma s + r), with
        hard slots in place of soft ones.
    """

    name = "lfu"

    def __init__(self, gamma: float = 0.9):
        if not 0.001 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma}, and must lie between 0.001 and 1")
        self.gamma = gamma

    def reset(self, num_experts: int) -> None:
        """All scores zero."""
        self._unit = 1.0
        self._score = [0.0] * num_experts

    def use(self, experts: Sequence[int]) -> None:
        """Decay everyone by growing the unit, then credit the experts used."""
        unit = self._grow()
        score = self._score
        for expert in experts:
            score[expert] += unit

    def _grow(self) -> float:
        unit = self._unit / self.gamma
        if unit > 2.0**512:
            shift = math.frexp(unit)[1]
            self._score[:] = [math.ldexp(score, -shift) for score in self._score]
            unit = math.ldexp(unit, -shift)
        self._unit = unit
        return unit

    def scores(self) -> list[float]:
        """Scores in units of one use now, float (num_experts,)."""
        return [score / self._unit for score in self._score]

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Lowest scores first; *candidates* ascend, and both min and sort keep the first."""
        if count == 1:
            return (min(candidates, key=self._score.__getitem__),)
        return sorted(candidates, key=self._score.__getitem__)[:count]


class Score(DecayedLFU):
    """
    Evict the expert that the router has wanted least of late.

    Rule: with each request ``S <- alpha * TopP(p) + (1 - alpha) * S`` for all experts of the layer,
    where ``p`` are the router's scores of this pass and TopP keeps the *top* best and sets the
    others to zero; the lowest S leaves, and of equal ones the lowest id. S outlives eviction.

    What differs from the source: ``p`` is known for the experts that a token chose, so TopP can
    keep no more than those (the source keeps twice the model's top-k); a pass of several tokens
    counts as one step with their mean. S is kept divided by alpha, which changes no order, and in
    the growing unit of `DecayedLFU`. With every weight equal it is ``lfu`` with gamma 1 - alpha.

    Args:
        alpha: Weight of the present, in (0, 0.999].
        top: Scores kept of each pass.

    Raises:
        ValueError: a value outside its range.
        MelinoeError: from `use`, when nobody told the router's weights.

    Source:
        Minus-recent-score caching of HybriMoE, arXiv:2504.05897; alpha .5 and the 12 best as in
        its published settings.
    """

    name = "score"
    uses_scores = True

    def __init__(self, alpha: float = 0.5, top: int = 12):
        if not 0 < alpha <= 0.999 or top < 1:
            raise ValueError(f"alpha is {alpha} and top {top}; want (0, 0.999] and 1 or more")
        super().__init__(gamma=1 - alpha)
        self._top = top
        self._weights: dict[int, float] | None = None

    def weigh(self, experts: Sequence[int], scores: Sequence[float]) -> None:
        """Keep the *top* best scores, of equal ones those of the lower ids."""
        best = sorted(zip(experts, scores, strict=True), key=lambda one: (-one[1], one[0]))
        self._weights = dict(best[: self._top])

    def use(self, experts: Sequence[int]) -> None:
        """Decay everyone by growing the unit, then credit by the weights told last."""
        if self._weights is None:
            raise MelinoeError(
                "policy 'score' needs the router's weights, which this trace does not hold; record "
                "it again with scores, or choose lfu with gamma 0.5, the same rule on choices alone"
            )
        unit = self._grow()
        for expert, weight in self._weights.items():
            self._score[expert] += unit * weight
        self._weights = None

    def prefetched(self, experts: Sequence[int]) -> None:
        """Nothing: no router has wanted them yet."""


class LFRU(Policy):
    """
    Evict the expert with the fewest uses for the time since the last one.

    Rule: ``frequency / (clock - last + 1)``, where the clock counts requests, *last* is its value
    at the expert's last use and *frequency* the requests that used the expert, never decayed; the
    lowest value leaves, and of equal ones the lowest id. Frequencies outlive eviction.

    Source:
        The ratio form, as compared for experts in public studies of MoE traces. Another rule with
        two partitions has the same name (Bilal and Kang, IEEE Access 5, 2017); it is not this one.
    """

    name = "lfru"

    def reset(self, num_experts: int) -> None:
        """Forget all uses."""
        self._clock = 0
        self._last = [0] * num_experts
        self._frequency = [0] * num_experts

    def use(self, experts: Sequence[int]) -> None:
        """One tick; note it, and one more use, for each expert."""
        self._clock += 1
        for expert in experts:
            self._last[expert] = self._clock
            self._frequency[expert] += 1

    def value(self, expert: int) -> float:
        """What the rule compares, now."""
        return self._frequency[expert] / (self._clock - self._last[expert] + 1)

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Lowest values first."""
        return sorted(candidates, key=self.value)[:count]


class Static(Policy):
    """
    Keep the experts that were popular on other traffic, whatever happens now.

    Rule: the resident expert of lowest *popularity* leaves, of equal ones the lowest id; uses and
    prefetches change nothing. An unpopular expert that must be loaded takes the slot of the least
    popular one and is the next to leave. With the popular ones prefetched and misses computed
    elsewhere, nothing ever moves: that is the source's placement.

    Args:
        popularity: A number per expert of the layer, such as how often it was chosen. From
            `for_layer`: per layer and expert, (layers, num_experts).

    Raises:
        ValueError: from `reset`, a popularity of another number of experts.

    Source:
        Fiddler, arXiv:2402.07033, which places experts by popularity on calibration data.
    """

    name = "static"

    def __init__(self, popularity: Sequence[float]):
        self._popularity = [float(value) for value in popularity]

    @classmethod
    def for_layer(cls, layer: int, num_layers: int, **options: Any) -> "Policy":
        """Of the popularities per layer, this layer's."""
        rows = options.pop("popularity", None)
        if rows is None or len(rows) != num_layers:
            raise MelinoeError(
                f"policy 'static' needs the popularity of every expert in all {num_layers} layers; "
                "give a trace or statistics of this model to count it from"
            )
        return cls(rows[layer], **options)

    def reset(self, num_experts: int) -> None:
        """Nothing to forget."""
        if len(self._popularity) != num_experts:
            raise ValueError(
                f"popularity is given for {len(self._popularity)} experts of {num_experts}"
            )

    def use(self, experts: Sequence[int]) -> None:
        """Nothing: the order was fixed before."""

    def victims(self, candidates: Sequence[int], count: int) -> Sequence[int]:
        """Least popular first."""
        return sorted(candidates, key=self._popularity.__getitem__)[:count]
