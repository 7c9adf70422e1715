"""
Which weight of the cache term keeps to a price: found over several runs, or steered within one.

The price is a budget for the gap, in nats per token, between the trained model and its control
on held-out text. The gap grows with the weight. `next_strength` takes what whole runs
cost and names the weight of the next one. `StrengthController` changes the weight in the course of
one run, by the gap to the control at the same step: up while there is budget left, down when it
is spent. That costs one run instead of several, but only a long run has the time: what an early
weight has done to the routers stays, however small the weight becomes.

Numbers only; nothing here knows of a model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from melinoe.errors import TrainingError


def parse_increase(text: str | float) -> float:
    """
    An increase of perplexity as a share: ``"1%"`` and ``"0.01"`` are both 0.01.

    Raises:
        TrainingError: no number, not above 0, or a bare number of 1 or more, which may mean either.
    """
    given = str(text).strip()
    try:
        percent = given.endswith("%")
        value = float(given.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        raise TrainingError(f"{given!r} is no increase of perplexity; write 1% or 0.01") from None
    if not math.isfinite(value) or value <= 0:
        raise TrainingError(f"an increase of {given} leaves nothing to spend; write 1% or 0.01")
    if value >= 1 and not percent:
        raise TrainingError(
            f"an increase of {given} may mean {value:g} % or {100 * value:g} %; write it with a "
            "percent sign"
        )
    return value


@dataclass
class StrengthController:
    """
    A proportional-integral controller of the logarithm of a weight.

    With u the largest share of its budget that any gap has spent, smoothed over measurements, and
    the error e = target - u, limited to [-`limit`, `limit`]::

        log weight += integral e + proportional (e - e before)

    Attributes:
        strength: The weight now.
        budgets: Name of a text to the gap it may have, in nats per token.
        target: Share of the budget to aim at; what is left covers the noise of the measurement.
        integral: Gain of the error itself.
        proportional: Gain of its change, which answers before the error has built up.
        smoothing: Weight of the past in the smoothed share, in [0, 1).
        limit: Largest error that counts, so that no measurement moves the weight far.
        floor: Smallest weight.
        ceiling: Largest weight.
    """

    strength: float
    budgets: Mapping[str, float]
    target: float = 0.85
    integral: float = 0.15
    proportional: float = 0.3
    smoothing: float = 0.5
    limit: float = 1.5
    floor: float = 1e-3
    ceiling: float = 30.0
    spent: float | None = field(default=None, init=False)
    _error: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets.values()) <= 0:
            raise ValueError("there must be a budget above 0")
        if not self.floor <= self.strength <= self.ceiling:
            raise ValueError(f"{self.strength} is outside [{self.floor}, {self.ceiling}]")

    def update(self, gaps: Mapping[str, float]) -> float:
        """
        Take a measurement and return the weight to go on with.

        Args:
            gaps: Of each text, in nats per token; one that is not finite moves nothing.
        """
        spent = max(gaps[name] / budget for name, budget in self.budgets.items())
        if not math.isfinite(spent):
            return self.strength
        past = spent if self.spent is None else self.spent
        self.spent = self.smoothing * past + (1 - self.smoothing) * spent
        error = max(-self.limit, min(self.limit, self.target - self.spent))
        change = 0.0 if self._error is None else error - self._error
        self._error = error
        moved = self.strength * math.exp(self.integral * error + self.proportional * change)
        self.strength = max(self.floor, min(self.ceiling, moved))
        return self.strength

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as numbers."""
        return {"strength": self.strength, "spent": self.spent, "error": self._error}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.strength, self.spent = float(state["strength"]), state["spent"]
        self._error = state["error"]


def next_strength(
    tried: Sequence[tuple[float, float]],
    *,
    target: float = 0.85,
    slope: float = 1.2,
    furthest: float = 8.0,
) -> float:
    """
    The weight for the next run, from what runs with other weights have spent.

    The spent share of the budget is taken as a power of the weight: through the two runs nearest to
    *target* on the log scale, or, while there is one, with the exponent *slope*.

    Args:
        tried: Weight and share of the budget that it spent (1: all of it), at least one.
        target: Share to aim at; what is left covers the noise of the measurement.
        slope: First guess of the exponent.
        furthest: Largest factor between the new weight and the nearest, up or down.
    """

    def log_spent(spent: float) -> float:
        # Noise may make a gap negative: a small one then.
        return math.log(max(spent, 0.05))

    aim = math.log(target)
    near = sorted(tried, key=lambda one: abs(log_spent(one[1]) - aim))
    (weight, spent), others = near[0], near[1:]
    if others and others[0][0] != weight:
        rise = log_spent(others[0][1]) - log_spent(spent)
        measured = rise / math.log(others[0][0] / weight)
        slope = max(0.4, min(3.0, measured))
    step = (aim - log_spent(spent)) / slope
    limit = math.log(furthest)
    return weight * math.exp(max(-limit, min(limit, step)))
