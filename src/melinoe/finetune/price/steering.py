"""Measures a run beside its control, steers it if asked, and judges its end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from melinoe.errors import TrainingError
from melinoe.finetune.price.panel import OTHER, OWN, Panel
from melinoe.finetune.price.reading import Cost, Loads
from melinoe.finetune.price.reference import Reference, check_trainer, costs_of, judge
from melinoe.finetune.price.strength import StrengthController

# One standard error above the gap must be within: the choosing texts are only a sample.
_LEVEL = 0.6827


@dataclass(frozen=True)
class Price:
    """
    Hold what may be paid: increases of perplexity over the control, as shares.

    Attributes:
        own: On held-out text of the domain that is trained on.
        other: On text of other domains; ``None``: no bound there.
    """

    own: float
    other: float | None = None

    def __post_init__(self) -> None:
        for value in (self.own, self.other):
            if value is not None and not value > 0:
                raise TrainingError(f"an increase of {value} leaves nothing to spend; give 0.01")

    @property
    def bounds(self) -> dict[str, float]:
        """Domain to its bound."""
        return {OWN: self.own} if self.other is None else {OWN: self.own, OTHER: self.other}

    @property
    def budgets(self) -> dict[str, float]:
        """Domain to the gap it may have, in nats per token: log(1 + increase)."""
        return {name: math.log1p(bound) for name, bound in self.bounds.items()}


class PriceCallback(TrainerCallback):
    """
    Measures the gap of a run to its reference, and may steer the weight of the cache term by it.

    Args:
        panel: The texts that the reference was measured on.
        price: What may be paid.
        reference: What the control left.
        strength: The weight of the cache term, or where it starts.
        steered: Whether the weight follows the gap during the run; else it stays.

    Attributes:
        history: One dictionary per measurement: ``step``, ``strength`` (until then), ``gap_own``
            and, with a bound on it, ``gap_other``, in nats per token.
        outcome: What was paid and what it bought, after the last step.
    """

    def __init__(
        self,
        panel: Panel,
        price: Price,
        reference: Reference,
        strength: float,
        *,
        steered: bool = False,
    ):
        self.panel, self.price, self.reference = panel, price, reference
        self.steered, self.strength = steered, strength
        self.controller = StrengthController(
            strength, price.budgets, floor=strength / 1000, ceiling=strength * 100
        )
        self.history: list[dict[str, float]] = []
        self.outcome: dict[str, Any] = {}

    def attach(self, trainer: Any) -> None:
        """Meet the trainer, before the first step; its objective's weight is now ours."""
        check_trainer(trainer)
        self.trainer = trainer
        trainer.locality.lambda_cache = self.strength

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the reference's turns, and steer; judge after the last step."""
        step = state.global_step
        if step not in self.reference.curve:
            return
        costs = costs_of(self.trainer, self.panel.steering)
        theirs = self.reference.curve[step]
        gaps = {name: costs[name].mean - theirs[name].mean for name in self.price.bounds}
        named = {f"gap_{name}": gap for name, gap in gaps.items()}
        self.history.append({"step": step, "strength": self.strength, **named})
        if step == state.max_steps:
            chosen = costs_of(self.trainer, self.panel.choosing)
            self.outcome = self._outcome(chosen, *judge(self.trainer, self.panel))
        elif self.steered:
            self.strength = self.controller.update(gaps)
            self.trainer.locality.lambda_cache = self.strength

    def _outcome(
        self, choosing: Mapping[str, Cost], judging: Mapping[str, Cost], loads: Loads
    ) -> dict[str, Any]:
        budgets, bounds = self.price.budgets, self.price.bounds
        theirs = self.reference.chosen
        seen = {name: choosing[name].gap(theirs[name], _LEVEL) for name in budgets}
        paid = {name: cost.increase(self.reference.judged[name]) for name, cost in judging.items()}
        at_most = max(seen[name].high / budget for name, budget in budgets.items())
        reference, base = self.reference.trained, self.reference.base
        return {
            "bounds": bounds,
            "strength": self.strength,
            "steered": self.steered,
            # On the choosing texts.
            "spent": max(seen[name].mean / budget for name, budget in budgets.items()),
            "spent_at_most": at_most,
            "feasible": at_most <= 1,
            # On the judging texts, which choose nothing.
            "paid": {name: estimate.to_dict() for name, estimate in paid.items()},
            "met": all(paid[name].mean <= bound for name, bound in bounds.items()),
            "met_by_the_whole_interval": all(paid[name].high <= bounds[name] for name in bounds),
            "transfers_per_token": {
                "ours": loads.per_token(),
                "reference": reference.per_token(),
                "base": base.per_token(),
            },
            "times_fewer_than": {
                "reference": loads.fewer_than(reference),
                "base": loads.fewer_than(base),
            },
            "history": self.history,
        }

    def metadata(self) -> dict[str, Any]:
        """For the record of the run."""
        return {"price": self.outcome}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON."""
        return {
            "controller": self.controller.state_dict(),
            "history": self.history,
            "strength": self.strength,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.controller.load_state_dict(state["controller"])
        self.history = [dict(row) for row in state["history"]]
        self.strength = float(state["strength"])
        self.trainer.locality.lambda_cache = self.strength
