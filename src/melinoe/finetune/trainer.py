"""
transformers' Trainer with the locality objective.

Not TRL's SFTTrainer (looked at in 1.16), which is in the way at each point where Melinoe adds
something: it replaces the model's head by a fused one that returns log-probabilities, and takes
back logits for a second forward pass; it tokenises by itself and learns a chat's assistant turns
only where the template has its own markers for them; its packing puts the whole batch into one row
with a collator that cannot be replaced; and its loss has no place for terms from inside the forward
pass with the denominators of the whole step. What its users know is read by `melinoe.data` (all of
its data forms) or is the Trainer's own: accumulation, schedules, mixed precision, DDP and FSDP2,
reporting.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerState

from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded
from melinoe.errors import TrainingError, WriteError
from melinoe.finetune.arguments import make_optimizer
from melinoe.finetune.forward import forward_terms
from melinoe.finetune.gradients import TermGradients
from melinoe.finetune.held_out import held_out_terms
from melinoe.finetune.packing import Packing
from melinoe.finetune.parts.adapters import TrainedParts
from melinoe.finetune.rates import Rates
from melinoe.finetune.resume import state as run_state
from melinoe.finetune.resume.checkpoints import write_checkpoint
from melinoe.finetune.resume.interrupt import StopRequest
from melinoe.finetune.steps import Steps
from melinoe.finetune.terms.objective import Objective
from melinoe.moe.finite import broken_weight

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


class LocalityTrainer(Trainer):
    """
    Trains on the objective's total, and logs each of its terms.

    All terms are means over the completion tokens of the whole optimiser step: over its accumulated
    batches and over all processes. A step whose loss or gradient is not finite on any process
    changes no weight; it is counted, and so many in a row end the run
    (`FinetuneSettings.max_bad_steps`).

    Args:
        settings: Of the run.
        rates: Of routers and low-rank updates at their peak.
        objective: Weighs the terms; its weights may change between steps.
        parts: What is trained.
        held_out: Measured before the first step, at its turns, and after the last.
        padding: Collator for *held_out*.
        packing: How the training examples are packed, if they are.
        progress: Called with each log row, on the main process.
        checkpoints: Where the run's checkpoints go; without it there are none.
        identity: What the run must have in common with one that goes on from them.
        stop: Tells when to end early.
        trainer_options: Of `transformers.Trainer`.

    Attributes:
        rows: The log: one dictionary per logged step, with the mean of each term since the last,
            and one per measurement of the held-out examples.
        skipped_steps: Steps that changed nothing because of a non-finite loss.
        best: Step and total of the best measurement after the first step, if the best is kept.
        stopped: Whether the run ended early, as it was asked to.
        bad_in_a_row: Steps skipped since the last good one.
    """

    def __init__(
        self,
        *,
        settings: FinetuneSettings,
        rates: Rates,
        objective: Objective,
        parts: TrainedParts,
        held_out: Sequence[Encoded] | None,
        padding: Collator,
        packing: Packing | None = None,
        progress: Progress | None = None,
        checkpoints: Path | None = None,
        identity: dict[str, Any] | None = None,
        stop: StopRequest | None = None,
        **trainer_options: Any,
    ):
        self.settings, self.rates, self.locality, self.parts = settings, rates, objective, parts
        super().__init__(**trainer_options)
        self.remove_callback(PrinterCallback)
        self.held_out, self.padding, self.packing = held_out, padding, packing
        self.progress, self.checkpoints = progress, checkpoints
        self.identity, self.stop = identity or {}, stop or StopRequest()
        # Whatever the model takes: its loss is computed here, with the denominator of the step.
        self.model_accepts_loss_kwargs = True
        self.rows: list[dict[str, Any]] = []
        self.skipped_steps, self.stopped = 0, False
        self.best: dict[str, Any] | None = None
        self.best_parts: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}  # of the good steps since the last row, here
        self.good_steps = 0
        self.term_norms: dict[str, float] = {}
        self._pending: dict[str, Tensor] = {}  # of the step that runs
        self._gradients = TermGradients()
        self._bad_now, self.bad_in_a_row = False, 0
        self.add_callback(Steps(self))

    # ---- one step ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the trained parts."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.parts, self.settings, self.rates)
        return self.optimizer

    def begin_step(self) -> None:
        """Tell the objective where the run stands; each process has its own batches."""
        done, accelerator = self.state.global_step, self.accelerator
        turn = done * accelerator.num_processes + accelerator.process_index
        self.locality.begin_step(
            done, self.state.max_steps, turn * self.args.gradient_accumulation_steps
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The combined loss of one batch; see `Objective`."""
        if self.packing is not None:
            inputs = self.packing.inputs(inputs)
        terms, outputs = forward_terms(
            model, inputs, self.locality, num_items_in_batch, training=True
        )
        self._bad_now |= not bool(torch.isfinite(terms.total))
        # A sharded parameter is no leaf of the graph, so there it cannot be said which term pulls.
        watch = self.state.global_step % (self.settings.log_every * 5) == 0
        if watch and not self._bad_now and not self.is_fsdp_enabled:
            self._gradients.add(terms, list(self.parts.router.values()))
        for name, value in terms.detached().items():
            self._pending[name] = self._pending.get(name, 0.0) + value.double()
        # Gradients are averaged over processes, but the terms are shares of a sum over them.
        loss = terms.total * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def end_step(self) -> None:
        """Before the optimiser's step: forget the gradients of a bad one, and count it."""
        pending, self._pending = self._pending, {}
        gradients, self._gradients = self._gradients, TermGradients()
        if not self._is_bad_anywhere():
            self.bad_in_a_row = 0
            for name, value in pending.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.good_steps += 1
            self.term_norms |= gradients.norms(self.accelerator)
            return
        self.skipped_steps += 1
        self.bad_in_a_row += 1
        for parameter in self.parts.all():
            parameter.grad = None
        step = self.state.global_step + 1
        broken = None
        if self.skipped_steps == 1 and not self.is_fsdp_enabled:
            broken = broken_weight(self._plain_model())
        if broken is not None:
            raise TrainingError(
                f"the loss of step {step} is not finite, because {broken}; get the checkpoint's "
                "files again"
            )
        if self.is_world_process_zero():
            log.warning("step %d is skipped because its loss is not finite", step)
        if self.bad_in_a_row >= self.settings.max_bad_steps:
            kept = ""
            if self.checkpoints is not None and self.skipped_steps < step:
                self.skipped_steps -= 1  # this one is not over, and comes again in a resumed run
                self._save_checkpoint(self._plain_model(), None)
                kept = f"; what was trained before is kept in {self.checkpoints}"
            raise TrainingError(
                f"the loss was not finite {self.bad_in_a_row} steps in a row, up to step {step}; "
                f"lower learning_rate or lambda_cache, or look for broken rows in the data{kept}"
            )

    def _is_bad_anywhere(self) -> bool:
        """Whether the step is bad on any process; they also agree on whether to stop."""
        gradients = [_local(p.grad) for p in self.parts.all() if p.grad is not None]
        sums = torch.stack([gradient.sum() for gradient in gradients])
        bad = self._bad_now or not bool(torch.isfinite(sums).all())
        self._bad_now, stop = False, self.stop.asked
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([float(bad), float(stop)], device=self.accelerator.device)
            bad, stop = (self.accelerator.reduce(flags, reduction="sum") > 0).tolist()
        self.stopped = stop
        return bad

    # ---- the log ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms to what the Trainer logs."""
        if "loss" in logs and self.good_steps:
            names, values = list(self.sums), torch.stack(list(self.sums.values()))
            if self.accelerator.num_processes > 1:
                values = self.accelerator.reduce(values, reduction="sum")
            means = (values / self.good_steps).tolist()
            row = {
                "step": self.state.global_step,
                **dict(zip(names, means, strict=True)),
                "grad_norm": float(logs.get("grad_norm", 0.0)),
                "learning_rate": float(logs.get("learning_rate", 0.0)),
                "skipped_steps": self.skipped_steps,
                **self.term_norms,
            }
            self.sums, self.good_steps, self.term_norms = {}, 0, {}
            self._tell(row)
            logs = {**logs, **row, "loss": row["total"]}
        super().log({k: v for k, v in logs.items() if _is_json(v)}, start_time)

    def _tell(self, row: dict[str, Any]) -> None:
        row = {key: value if _is_json(value) else None for key, value in row.items()}
        self.rows.append(row)
        if self.progress is not None and self.is_world_process_zero():
            self.progress({**row, "steps": self.state.max_steps})

    # ---- measuring ----

    def measure(self, data: Sequence[Encoded]) -> dict[str, float]:
        """Means of the terms over *data* with the weights as they are; all processes must call."""
        return held_out_terms(
            self._plain_model(), data, self.locality, self.padding, self.settings, self.accelerator
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the held-out examples and log the means, each under ``eval_`` and its name."""
        terms = self.measure(self.held_out or eval_dataset)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in terms.items()}
        step = self.state.global_step
        self._tell({"step": step, **metrics})
        self.log(metrics)
        better = self.best is None or terms["total"] < self.best["total"]
        if self.settings.keep == "best" and step > 0 and better:
            self.best = {"step": step, "total": terms["total"]}
            self.best_parts = {k: run_state.gather(p).clone() for k, p in self.trained().items()}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # ---- checkpoints ----

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters as they are now, by the names they had before any wrapping."""
        return run_state.trained_parameters(
            self._plain_model(), [*self.parts.router, *self.parts.lora]
        )

    def find_parts_again(self) -> None:
        """Let the trained parts be those of the wrapped model: sharding makes new parameters."""
        now = self.trained()
        for group in (self.parts.router, self.parts.lora):
            group |= {name: now[name] for name in group}

    def _plain_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Instead of the Trainer's: trained parts only, no pickle, whole or not there."""
        assert self.checkpoints is not None
        finished = self.state.global_step >= self.state.max_steps
        tensors = run_state.capture(self, finished=finished)
        if not self.is_world_process_zero():
            return
        state = run_state.describe(self, finished=finished)
        texts = {"trainer_state.json": _state_text(self.state)}
        # What was saved before the loss broke is not given up for weights that broke it.
        step, keep = (
            self.state.global_step,
            self.settings.keep_checkpoints + bool(self.bad_in_a_row),
        )
        try:
            write_checkpoint(self.checkpoints, step, tensors, state, texts, keep=keep)
        except WriteError as error:
            # Going on loses nothing that stopping would keep.
            log.warning("%s; the run goes on, and the checkpoints before are kept", error)

    def _load_from_checkpoint(self, path: str, model: nn.Module | None = None) -> None:
        run_state.restore_parts(self, Path(path))

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        if path is not None:
            run_state.restore_rest(self, Path(path))

    def _load_rng_state(self, path: str | None) -> None:
        if path is not None:
            run_state.restore_random_state(self, Path(path))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _state_text(state: TrainerState) -> str:
    return json.dumps(dataclasses.asdict(state), indent=1, sort_keys=True) + "\n"
