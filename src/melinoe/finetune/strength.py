"""
Which weight of the cache term keeps to a price: a controller over the course of one run.

The price is a budget for the gap, in nats per token, between the model in training and its NLL-only
reference at the same step, on held-out text. The dual problem (the largest saving whose gap stays
within the budget) has one multiplier, the weight of the cache term, and the gap grows with it. So
the logarithm of the weight follows the gap: up while there is budget left, down when it is spent.

Numbers only; nothing here knows of a model.
"""

import math
from collections.abc import Mapping
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
