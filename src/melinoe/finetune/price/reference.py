"""
The control that a price is measured against: the same runs without the locality terms.

``price_reference.json``, beside the checkpoint it wrote, says which run it was and on which texts;
what these cost, turn by turn and at the end; and what a cache would have loaded for its model and
for the base model.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from melinoe.config import FinetuneSettings, experts_in_share
from melinoe.data import Encoded
from melinoe.errors import TrainingError
from melinoe.finetune.price.panel import OWN, Panel
from melinoe.finetune.price.reading import Cost, Loads, read

NAME = "price_reference"


def identity(
    settings: FinetuneSettings,
    panel: Panel,
    base_fingerprint: str,
    data_fingerprint: str,
    teacher: str | None = None,
    anchor: str | None = None,
) -> dict[str, Any]:
    """Name what a run and its reference must have in common: all but the locality terms."""
    return {
        "settings": settings.control().deciding(),
        "texts": panel.fingerprint(),
        "base": base_fingerprint,
        "data": data_fingerprint,
        "teacher": teacher,
        "anchor": anchor,
    }


@dataclass(frozen=True)
class Reference:
    """
    Hold what the control left.

    Attributes:
        identity: See `identity`.
        every: Steps between its measurements.
        curve: Step to the cost of each steering half, by domain.
        chosen: Domain to the cost of the choosing texts after the last step.
        judged: The same of the judging texts.
        base: What a cache would have loaded for the base model, on the judging texts of the domain
            that is trained on.
        trained: The same for this run's model.
    """

    identity: Mapping[str, Any]
    every: int
    curve: Mapping[int, Mapping[str, Cost]]
    chosen: Mapping[str, Cost]
    judged: Mapping[str, Cost]
    base: Loads
    trained: Loads

    def save(self, directory: Path) -> None:
        """Write ``price_reference.json`` into *directory*."""
        record = {
            "identity": self.identity,
            "every": self.every,
            "curve": {step: _costs(costs) for step, costs in self.curve.items()},
            "chosen": _costs(self.chosen),
            "judged": _costs(self.judged),
            "base": self.base.to_dict(),
            "trained": self.trained.to_dict(),
        }
        path = directory / f"{NAME}.json"
        _beside(path).write_text(json.dumps(record), encoding="utf-8")
        os.replace(_beside(path), path)

    @classmethod
    def load(cls, directory: str | Path) -> "Reference":
        """
        Read what `save` wrote.

        Raises:
            TrainingError: there is none, or it is damaged.
        """
        directory = Path(directory).expanduser()
        path = directory / f"{NAME}.json"
        if not is_reference(directory):
            raise TrainingError(
                f"{directory} is no reference of a price: it has no {path.name}; give the "
                "directory that an earlier run with a price wrote as its reference, or none"
            )
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                identity=record["identity"],
                every=int(record["every"]),
                curve={int(step): _read(costs) for step, costs in record["curve"].items()},
                chosen=_read(record["chosen"]),
                judged=_read(record["judged"]),
                base=Loads.from_dict(record["base"]),
                trained=Loads.from_dict(record["trained"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise TrainingError(
                f"the reference in {directory} is damaged ({error}); give none to make it again"
            ) from error

    def check(self, wanted: Mapping[str, Any], directory: str | Path) -> None:
        """
        Raises unless this is the reference of a run with the identity *wanted*.

        Raises:
            TrainingError: another base model, data, texts, or a setting that differs; it names it.
        """
        for key, what in (
            ("base", "base model"),
            ("data", "data"),
            ("texts", "held-out texts"),
            ("teacher", "teacher"),
            ("anchor", "anchor text"),
        ):
            if self.identity.get(key) != wanted[key]:
                raise TrainingError(
                    f"the reference in {directory} is of another {what}; give one of this run's, "
                    "or none to make it"
                )
        ours, theirs = wanted["settings"], self.identity["settings"]
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise TrainingError(
                    f"the reference in {directory} was trained with {name} {theirs.get(name)}, "
                    f"this run with {ours.get(name)}; give one that agrees, or none to make it"
                )


def is_reference(directory: Path) -> bool:
    """Whether `Reference.save` wrote there."""
    return (directory / f"{NAME}.json").is_file()


class ReferenceCallback(TrainerCallback):
    """
    Watches the control.

    Args:
        panel: The texts.
        every: Steps between measurements; absent: a twenty-fifth of the run.
    """

    def __init__(self, panel: Panel, every: int | None = None):
        self.panel, self.every = panel, every
        self.curve: dict[int, dict[str, Cost]] = {}
        self.chosen: dict[str, Cost] = {}
        self.judged: dict[str, Cost] = {}
        self.loads: dict[str, Loads] = {}

    def attach(self, trainer: Any) -> None:
        """Meet the trainer, before the first step."""
        check_trainer(trainer)
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the base model chose, before any step."""
        self.every = self.every or default_turn(state.max_steps)
        if state.global_step == 0:
            _, self.loads["base"] = judge(self.trainer, self.panel)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The steering texts at every turn; after the last step the judging ones too."""
        assert self.every is not None
        last = state.global_step == state.max_steps
        if state.global_step % self.every == 0 or last:
            self.curve[state.global_step] = costs_of(self.trainer, self.panel.steering)
        if last:
            self.chosen = costs_of(self.trainer, self.panel.choosing)
            self.judged, self.loads["trained"] = judge(self.trainer, self.panel)

    def reference(self, identity: Mapping[str, Any]) -> Reference:
        """What the run left, after it."""
        assert self.every is not None
        return Reference(
            identity,
            self.every,
            self.curve,
            self.chosen,
            self.judged,
            self.loads["base"],
            self.loads["trained"],
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON."""
        return {
            "every": self.every,
            "curve": {str(step): _costs(costs) for step, costs in self.curve.items()},
            "loads": {name: loads.to_dict() for name, loads in self.loads.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.every = state["every"]
        self.curve = {int(step): _read(costs) for step, costs in state["curve"].items()}
        self.loads = {name: Loads.from_dict(one) for name, one in state["loads"].items()}


def check_trainer(trainer: Any) -> None:
    """
    Raises if a price cannot be kept in this run.

    Raises:
        TrainingError: weights are sharded over devices.
    """
    if getattr(trainer, "is_fsdp_enabled", False):
        raise TrainingError(
            "a price cannot be kept with sharded weights, since the texts are read on each device; "
            "use data-parallel training without sharding, or set lambda_cache yourself"
        )


def default_turn(steps: int) -> int:
    """Steps between measurements: a twenty-fifth of the run."""
    return max(1, steps // 25)


def costs_of(trainer: Any, texts: Mapping[str, Sequence[Encoded]]) -> dict[str, Cost]:
    """What *texts* cost the model as it is, by domain."""
    model = _model(trainer)
    return {name: read(model, some, trainer.settings)[0] for name, some in texts.items()}


def judge(trainer: Any, panel: Panel) -> tuple[dict[str, Cost], Loads]:
    """What the judging texts cost, and what a cache would load for those trained on."""
    model, costs, loads = _model(trainer), {}, None
    for name, texts in panel.judging.items():
        routers = trainer.parts.routers if name == OWN else ()
        costs[name], trace = read(model, texts, trainer.settings, routers)
        if trace is not None:
            share = trainer.settings.capacity
            loads = Loads.of(trace, experts_in_share(share, trace.num_experts))
    assert loads is not None
    return costs, loads


def _model(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=True)


def _costs(costs: Mapping[str, Cost]) -> dict[str, Any]:
    return {name: cost.to_dict() for name, cost in costs.items()}


def _read(costs: Mapping[str, Any]) -> dict[str, Cost]:
    return {name: Cost.from_dict(values) for name, values in costs.items()}


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
