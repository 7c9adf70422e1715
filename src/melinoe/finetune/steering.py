"""
Keeps a run to a price: its steps are steered, and what was overspent is taken back at its end.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from melinoe.errors import TrainingError
from melinoe.finetune.panel import OTHER, OWN, Panel
from melinoe.finetune.reading import Cost, Loads
from melinoe.finetune.reference import Reference, check_trainer, judge, named_parts, steer
from melinoe.finetune.strength import StrengthController

# One standard error: the steering texts are a sample, and the judging ones another.
_LEVEL = 0.6827
_HALVINGS = 6


@dataclass(frozen=True)
class Price:
    """
    What may be paid: increases of perplexity over the NLL-only reference, as shares.

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
    Steers the weight of the cache term of a run, and takes back what was overspent at its end.

    Args:
        panel: The texts that the reference was measured on.
        price: What may be paid.
        reference: What the NLL-only run left.
        strength: The weight to start from.

    Attributes:
        history: One dictionary per measurement: ``step``, ``strength`` (until then), ``gap_own``
            and, with a bound on it, ``gap_other``, in nats per token.
        kept: Share of the way from the reference to the trained weights that was kept.
        outcome: What was paid and what it bought, after the last step.
    """

    def __init__(self, panel: Panel, price: Price, reference: Reference, strength: float):
        self.panel, self.price, self.reference = panel, price, reference
        self.controller = StrengthController(strength, price.budgets)
        self.history: list[dict[str, float]] = []
        self.kept = 1.0
        self.outcome: dict[str, Any] = {}

    def attach(self, trainer: Any) -> None:
        """Meet the trainer, before the first step; its objective's weight is now ours."""
        check_trainer(trainer)
        self.trainer = trainer
        trainer.locality.lambda_cache = self.controller.strength

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the reference's turns and go on with another weight; settle at the end."""
        step, last = state.global_step, state.global_step == state.max_steps
        if step in self.reference.curve:
            costs = steer(self.trainer, self.panel)
            gaps = {name: costs[name].mean - theirs.mean for name, theirs in self._at(step).items()}
            row = {
                "step": step,
                "strength": self.controller.strength,
                **{f"gap_{name}": gap for name, gap in gaps.items()},
            }
            self.history.append(row)
            self.trainer.locality.lambda_cache = self.controller.update(gaps)
        if last:
            self._settle()

    def _at(self, step: int) -> Mapping[str, Cost]:
        costs = self.reference.curve[step]
        return {name: costs[name] for name in self.price.bounds}

    # ---- the end ----

    def _settle(self) -> None:
        parts = named_parts(self.trainer)
        trained = {name: part.detach().clone() for name, part in parts.items()}
        self.kept = largest_share(lambda share: self._is_within(parts, trained, share), _HALVINGS)
        self._mix(parts, trained, self.kept)
        costs, loads = judge(self.trainer, self.panel)
        self.outcome = self._outcome(costs, loads)

    def _is_within(
        self, parts: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float
    ) -> bool:
        """Whether the weights at *share* keep every bound on the steering texts, with a margin."""
        if share == 0:
            return True
        self._mix(parts, trained, share)
        costs = steer(self.trainer, self.panel)
        return all(
            costs[name].gap(self.reference.last[name], _LEVEL).high <= budget
            for name, budget in self.price.budgets.items()
        )

    @torch.no_grad()
    def _mix(
        self, parts: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float
    ) -> None:
        for name, part in parts.items():
            theirs = self.reference.parts[name].to(part)
            # Not by the formula where nothing is mixed: it would round.
            part.copy_(trained[name] if share == 1 else torch.lerp(theirs, trained[name], share))

    def _outcome(self, costs: Mapping[str, Cost], loads: Loads) -> dict[str, Any]:
        paid = {name: cost.increase(self.reference.judged[name]) for name, cost in costs.items()}
        bounds = self.price.bounds
        means = all(paid[name].mean <= bound for name, bound in bounds.items())
        sure = all(paid[name].high <= bound for name, bound in bounds.items())
        reference, base = self.reference.trained, self.reference.base
        return {
            "bounds": bounds,
            "paid": {name: estimate.to_dict() for name, estimate in paid.items()},
            "met": means,
            "met_by_the_whole_interval": sure,
            "kept": self.kept,
            "strength": self.controller.strength,
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
        return {"controller": self.controller.state_dict(), "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.controller.load_state_dict(state["controller"])
        self.history = [dict(row) for row in state["history"]]
        self.trainer.locality.lambda_cache = self.controller.strength


def largest_share(is_within: Callable[[float], bool], halvings: int) -> float:
    """
    The largest share in [0, 1] found within, by halving: 1 if that is, else within 2^-halvings.

    Args:
        is_within: Of a share; true at 0, and false above some share if it ever is.
        halvings: How often to ask after 1 itself.
    """
    if is_within(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if is_within(middle) else (low, middle)
    return low
