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

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded
from melinoe.errors import TrainingError
from melinoe.finetune.adapters import TrainedParts
from melinoe.finetune.forward import forward_terms
from melinoe.finetune.held_out import held_out_terms
from melinoe.finetune.objective import Objective, Terms
from melinoe.finetune.packing import Packing

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
        objective: Weighs the terms; its weights may change between steps.
        parts: What is trained.
        held_out: Measured before the first step, at its turns, and after the last.
        padding: Collator for *held_out*.
        packing: How the training examples are packed, if they are.
        progress: Called with each log row, on the main process.
        trainer_options: Of `transformers.Trainer`.

    Attributes:
        rows: The log: one dictionary per logged step, with the mean of each term since the last,
            and one per measurement of the held-out examples.
        skipped_steps: Steps that changed nothing because of a non-finite loss.
    """

    def __init__(
        self,
        *,
        settings: FinetuneSettings,
        objective: Objective,
        parts: TrainedParts,
        held_out: Sequence[Encoded] | None,
        padding: Collator,
        packing: Packing | None = None,
        progress: Progress | None = None,
        **trainer_options: Any,
    ):
        super().__init__(**trainer_options)
        self.remove_callback(PrinterCallback)
        self.settings, self.locality, self.parts = settings, objective, parts
        self.held_out, self.padding, self.packing = held_out, padding, packing
        self.progress = progress
        # Whatever the model takes: its loss is computed here, with the denominator of the step.
        self.model_accepts_loss_kwargs = True
        self.rows: list[dict[str, Any]] = []
        self.skipped_steps = 0
        self._bad_in_a_row = 0
        self._bad_now = False
        self._pending: dict[str, Tensor] = {}  # of the step that runs
        self._sums: dict[str, Tensor] = {}  # of the good steps since the last row
        self._good_steps = 0
        self._gradients: dict[str, list[Tensor]] = {}
        self._term_norms: dict[str, float] = {}
        self.add_callback(_Steps(self))

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
        if self.state.global_step % (self.settings.log_every * 5) == 0 and not self._bad_now:
            self._remember_gradients(terms)
        for name, value in terms.detached().items():
            self._pending[name] = self._pending.get(name, torch.zeros_like(value)) + value
        # Gradients are averaged over processes, but the terms are shares of a sum over them.
        loss = terms.total * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _remember_gradients(self, terms: Terms) -> None:
        """Each term's own weighted gradient on the routers: which one pulls, and how hard."""
        if self.is_fsdp_enabled:
            return  # a sharded parameter is no leaf of the graph
        parameters = list(self.parts.router.values())
        for name, term in terms.parts().items():
            if (weight := terms.weights[name]) and term.requires_grad:
                gradients = torch.autograd.grad(
                    weight * term, parameters, retain_graph=True, allow_unused=True
                )
                so_far = self._gradients.get(name, [torch.zeros_like(p) for p in parameters])
                self._gradients[name] = [
                    sum_ if g is None else sum_ + g
                    for sum_, g in zip(so_far, gradients, strict=True)
                ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms to what the Trainer logs."""
        if "loss" in logs and self._good_steps:
            names, values = list(self._sums), torch.stack(list(self._sums.values())).double()
            if self.accelerator.num_processes > 1:
                values = self.accelerator.reduce(values, reduction="sum")
            means = (values / self._good_steps).tolist()
            row = {
                "step": self.state.global_step,
                **dict(zip(names, means, strict=True)),
                "grad_norm": float(logs.get("grad_norm", 0.0)),
                "learning_rate": float(logs.get("learning_rate", 0.0)),
                "skipped_steps": self.skipped_steps,
                **self._term_norms,
            }
            self._sums, self._good_steps, self._term_norms = {}, 0, {}
            self._tell(row)
            logs = {**logs, **row, "loss": row["total"]}
        super().log(logs, start_time)

    def _tell(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.progress is not None and self.is_world_process_zero():
            self.progress({**row, "steps": self.state.max_steps})

    def measure(self, data: Sequence[Encoded]) -> dict[str, float]:
        """Means of the terms over *data* with the weights as they are; all processes must call."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=True)
        return held_out_terms(
            model,
            data,
            self.locality,
            self.padding,
            self.settings,
            self.accelerator,
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
        self._tell({"step": self.state.global_step, **metrics})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def begin_step(self) -> None:
        """Tell the objective where the run stands; each process has its own batches."""
        done, accelerator = self.state.global_step, self.accelerator
        turn = done * accelerator.num_processes + accelerator.process_index
        self.locality.begin_step(
            done, self.state.max_steps, turn * self.args.gradient_accumulation_steps
        )

    def end_step(self) -> None:
        """Before the optimiser's step: forget the gradients of a bad one, and count it."""
        pending, self._pending = self._pending, {}
        gradients, self._gradients = self._gradients, {}
        if not self._is_bad_anywhere():
            self._bad_in_a_row = 0
            for name, value in pending.items():
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._good_steps += 1
            if gradients:
                self._term_norms = {
                    f"grad_norm_{name}": self._norm(parts) for name, parts in gradients.items()
                }
            return
        self.skipped_steps += 1
        self._bad_in_a_row += 1
        for parameter in self.parts.all():
            parameter.grad = None
        step = self.state.global_step + 1
        if self.is_world_process_zero():
            log.warning("step %d is skipped because its loss is not finite", step)
        if self._bad_in_a_row >= self.settings.max_bad_steps:
            raise TrainingError(
                f"the loss was not finite {self._bad_in_a_row} steps in a row, up to step {step}; "
                "lower learning_rate or lambda_cache, or look for broken rows in the data"
            )

    def _is_bad_anywhere(self) -> bool:
        gradients = [_local(p.grad) for p in self.parts.all() if p.grad is not None]
        sums = torch.stack([gradient.sum() for gradient in gradients])
        bad = self._bad_now or not bool(torch.isfinite(sums).all())
        self._bad_now = False
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(bad), device=self.accelerator.device)
            bad = bool(self.accelerator.reduce(flag, reduction="sum"))
        return bad

    def _norm(self, gradients: list[Tensor]) -> float:
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(flat, reduction="sum")
        return float(flat.norm())


class _Steps(TrainerCallback):
    """Calls the trainer where the steps of its own stand between the Trainer's."""

    def __init__(self, trainer: LocalityTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.held_out and state.global_step == 0:
            self.trainer.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.held_out and state.global_step == state.max_steps:
            control.should_evaluate = True


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
