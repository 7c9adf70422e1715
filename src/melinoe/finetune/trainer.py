"""
transformers' Trainer with the locality objective.

Not TRL's SFTTrainer: it brings its own tokenisation, adapters and metrics, and what is added here
(terms from inside the forward pass, steps that are skipped) would have to work around each.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune.adapters import TrainedParts
from melinoe.finetune.objective import Objective, Terms
from melinoe.moe.routing import RoutingRecorder

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


class LocalityTrainer(Trainer):
    """
    Adds the locality terms to the model's own next-token loss, and logs each.

    A step whose loss or gradient is not finite changes no weight; it is counted, and so many in a
    row end the run (`FinetuneSettings.max_bad_steps`).

    Attributes:
        rows: The log: one dictionary per logged step, with the mean of each term since the last.
        skipped_steps: Steps that changed nothing because of a non-finite loss.
    """

    def __init__(
        self,
        *,
        settings: FinetuneSettings,
        objective: Objective,
        recorder: RoutingRecorder,
        parts: TrainedParts,
        progress: Progress | None = None,
        **trainer_options: Any,
    ):
        super().__init__(**trainer_options)
        self.remove_callback(PrinterCallback)
        self.settings, self.locality, self.parts = settings, objective, parts
        self.recorder, self.progress = recorder, progress
        self.rows: list[dict[str, Any]] = []
        self.skipped_steps = 0
        self._bad_in_a_row = 0
        self._bad_now = False
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._term_norms: dict[str, float] = {}
        self.add_callback(_SkipBadSteps(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The combined loss of one batch; see `Objective`."""
        denominator = num_items_in_batch if self.model_accepts_loss_kwargs else None
        with self.recorder:
            nll, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            routings = self.recorder.take()
        terms = self.locality(
            nll, routings, inputs["labels"], inputs["attention_mask"], denominator
        )
        loss = terms.total
        if torch.isfinite(loss):
            self._remember(terms)
        else:
            self._bad_now = True
            # A loss of nothing, so that the step can run to its end, where it is skipped.
            loss = sum(p.sum() * 0 for p in self.parts.all()).nan_to_num()  # type: ignore[union-attr]
        return (loss, outputs) if return_outputs else loss

    def _remember(self, terms: Terms) -> None:
        if self.state.global_step % (self.settings.log_every * 5) == 0 and not self._term_norms:
            self._term_norms = self._norms(terms)
        for name, value in terms.detached().items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._batches += 1

    def _norms(self, terms: Terms) -> dict[str, float]:
        """Norm of each term's own weighted gradient on the routers: which one pulls, and how."""
        weights = {
            "nll": 1.0,
            "cache": self.settings.lambda_cache,
            "anchor": self.settings.lambda_rank,
        }
        parameters = list(self.parts.router.values())
        norms = {}
        for name, weight in weights.items():
            term = getattr(terms, name)
            if weight and term.requires_grad:
                gradients = torch.autograd.grad(
                    term, parameters, retain_graph=True, allow_unused=True
                )
                squares = [(g.float() ** 2).sum() for g in gradients if g is not None]
                norms[f"grad_norm_{name}"] = weight * float(sum(squares) ** 0.5)
        return norms

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms to what the Trainer logs."""
        if "loss" in logs and self._batches:
            steps = self.args.gradient_accumulation_steps
            scale = steps if self.model_accepts_loss_kwargs else 1
            terms = {name: float(s) * scale / self._batches for name, s in self._sums.items()}
            row = {
                "step": self.state.global_step,
                **terms,
                "grad_norm": float(logs.get("grad_norm", 0.0)),
                "learning_rate": float(logs.get("learning_rate", 0.0)),
                "skipped_steps": self.skipped_steps,
                **self._term_norms,
            }
            self._sums, self._batches, self._term_norms = {}, 0, {}
            self.rows.append(row)
            logs = {**logs, **row}
            if self.progress is not None:
                self.progress({**row, "steps": self.state.max_steps})
        super().log(logs, start_time)

    def end_step(self, grad_norm_is_finite: bool) -> None:
        """Before the optimiser's step: forget the gradients of a bad one, and count it."""
        if not self._bad_now and grad_norm_is_finite:
            self._bad_in_a_row = 0
            return
        self._bad_now = False
        self.skipped_steps += 1
        self._bad_in_a_row += 1
        for parameter in self.parts.all():
            parameter.grad = None
        step = self.state.global_step + 1
        log.warning("step %d is skipped because its loss is not finite", step)
        if self._bad_in_a_row >= self.settings.max_bad_steps:
            raise TrainingError(
                f"the loss was not finite {self._bad_in_a_row} steps in a row, up to step {step}; "
                "lower learning_rate or lambda_cache, or look for broken rows in the data"
            )


class _SkipBadSteps(TrainerCallback):
    """Calls `LocalityTrainer.end_step` where gradients are complete and unused."""

    def __init__(self, trainer: LocalityTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.trainer.parts.all() if p.grad is not None]
        finite = bool(torch.isfinite(torch.stack([g.sum() for g in gradients])).all())
        self.trainer.end_step(finite)
