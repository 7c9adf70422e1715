"""
transformers' Trainer with the locality objective: one step, the log, measuring, checkpoints.

Why not TRL's SFTTrainer: docs/architecture.md, finetune.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded
from melinoe.errors import DependencyError, TrainingError, WriteError
from melinoe.finetune import resume
from melinoe.finetune.objective import Objective, Terms, held_out_terms
from melinoe.finetune.parts import TrainedParts
from melinoe.finetune.rates import Rates
from melinoe.finetune.rows import Packing
from melinoe.moe.finite import broken_weight

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_MOST_BAD_STEPS = 5  # non-finite losses in a row before a run stops


class LocalityTrainer(Trainer):
    """
    Trains on the objective's total, and logs each of its terms.

    All terms are means over the completion tokens of the whole optimiser step: over its accumulated
    batches and over all processes. A step whose loss or gradient is not finite on any process
    changes no weight; it is counted, and five in a row end the run.

    Args:
        settings: Of the run.
        rates: Of routers and low-rank updates at their peak.
        objective: Weighs the terms.
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
        stop: resume.StopRequest | None = None,
        **trainer_options: Any,
    ):
        self.settings, self.rates, self.locality, self.parts = settings, rates, objective, parts
        super().__init__(**trainer_options)
        self.remove_callback(PrinterCallback)
        self.held_out, self.padding, self.packing = held_out, padding, packing
        self.progress, self.checkpoints = progress, checkpoints
        self.identity, self.stop = identity or {}, stop or resume.StopRequest()
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
        self._pulls: dict[str, list[Tensor]] = {}  # each term's own gradient, likewise
        self._bad_now, self.bad_in_a_row = False, 0
        self.add_callback(_Turns(self))

    # ---- one step ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the trained parts."""
        if self.optimizer is None:
            groups = [{"params": list(self.parts.router.values()), "lr": self.rates.routers}]
            if self.parts.lora:
                groups.append({"params": list(self.parts.lora.values()), "lr": self.rates.low_rank})
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def begin_step(self) -> None:
        """Tell the objective where the run stands; each process has its own batches."""
        done, accelerator = self.state.global_step, self.accelerator
        turn = done * accelerator.num_processes + accelerator.process_index
        self.locality.begin_step(turn * self.args.gradient_accumulation_steps)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the combined loss of one batch; see `Objective`."""
        if self.packing is not None:
            inputs = self.packing.inputs(inputs)
        terms = self.locality.measure(model, inputs, num_items_in_batch, training=True)
        self._bad_now |= not bool(torch.isfinite(terms.total))
        # A sharded parameter is no leaf of the graph, so there it cannot be said which term pulls.
        watch = self.state.global_step % (self.settings.log_every * 5) == 0
        if watch and not self._bad_now and not self.is_fsdp_enabled:
            self._add_pulls(terms)
        for name, value in terms.detached().items():
            self._pending[name] = self._pending.get(name, 0.0) + value.double()
        # Gradients are averaged over processes, but the terms are shares of a sum over them.
        loss = terms.total * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def end_step(self) -> None:
        """Forget the gradients of a bad step, and count it, before the optimiser's step."""
        pending, self._pending = self._pending, {}
        pulls, self._pulls = self._pulls, {}
        if not self._is_bad_anywhere():
            self.bad_in_a_row = 0
            for name, value in pending.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.good_steps += 1
            self.term_norms |= {f"grad_norm_{k}": self._norm(v) for k, v in pulls.items()}
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
        if self.bad_in_a_row >= _MOST_BAD_STEPS:
            kept = ""
            if self.checkpoints is not None and self.skipped_steps < step:
                self.skipped_steps -= 1  # this one is not over, and comes again in a resumed run
                self._save_checkpoint(self._plain_model(), None)
                kept = f"; what was trained before is kept in {self.checkpoints}"
            raise TrainingError(
                f"the loss was not finite {self.bad_in_a_row} steps in a row, up to step {step}; "
                f"lower learning_rate or lambda_cache, or look for broken rows in the data{kept}"
            )

    def _add_pulls(self, terms: Terms) -> None:
        """Add each weighted term's gradient of the routers. Cost: a backward pass per term."""
        parameters = list(self.parts.router.values())
        for name, term in terms.values.items():
            if not terms.weights[name] or not term.requires_grad:
                continue
            gradients = torch.autograd.grad(
                terms.weights[name] * term, parameters, retain_graph=True, allow_unused=True
            )
            so_far = self._pulls.get(name) or [torch.zeros_like(p) for p in parameters]
            self._pulls[name] = [
                one if more is None else one + more
                for one, more in zip(so_far, gradients, strict=True)
            ]

    def _norm(self, gradients: list[Tensor]) -> float:
        """The norm of a gradient, summed over all processes."""
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(flat, reduction="sum")
        return float(flat.norm())

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
            self.best_parts = {k: resume.gather(p).clone() for k, p in self.trained().items()}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # ---- checkpoints ----

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the names they had before any wrapping."""
        now = {
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
            for name, parameter in self._plain_model().named_parameters()
        }
        return {name: now[name] for name in (*self.parts.router, *self.parts.lora)}

    def find_parts_again(self) -> None:
        """Let the trained parts be those of the wrapped model: sharding makes new parameters."""
        now = self.trained()
        for group in (self.parts.router, self.parts.lora):
            group |= {name: now[name] for name in group}

    def _plain_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save trained parts only, without pickle, whole or not at all."""
        assert self.checkpoints is not None
        finished = self.state.global_step >= self.state.max_steps
        tensors = self._tensors_to_keep(finished)
        if not self.is_world_process_zero():
            return
        state = {
            "run": self.identity,
            "finished": finished,
            "schedule": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "rates": [group["lr"] for group in self.optimizer.param_groups],  # type: ignore[union-attr]
            "rows": self.rows,
            "skipped_steps": self.skipped_steps,
            "good_steps": self.good_steps,
            "term_norms": self.term_norms,
            "best": self.best,
            "callbacks": {type(one).__name__: one.state_dict() for one in self._stateful()},
        }
        text = json.dumps(dataclasses.asdict(self.state), indent=1, sort_keys=True) + "\n"
        try:
            resume.write_checkpoint(
                self.checkpoints,
                self.state.global_step,
                tensors,
                state,
                {"trainer_state.json": text},
                # What was saved before the loss broke is not given up for weights that broke it.
                more=bool(self.bad_in_a_row),
            )
        except WriteError as error:
            # Going on loses nothing that stopping would keep.
            log.warning("%s; the run goes on, and the checkpoints before are kept", error)

    def _tensors_to_keep(self, finished: bool) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint in its groups; a finished run needs no optimizer's."""
        parameters = self.trained()
        groups = {
            "parts": {name: resume.gather(parameter) for name, parameter in parameters.items()},
            "best": dict(self.best_parts),
        }
        if finished:
            return groups
        state, accelerator = self.optimizer.state, self.accelerator  # type: ignore[union-attr]
        groups["optimizer"] = {
            f"{key}:{name}": resume.gather(value)
            for name, parameter in parameters.items()
            for key, value in state.get(parameter, {}).items()
        }
        random_state = resume.random_state()[None].to(accelerator.device)
        groups["run"] = {
            "random": accelerator.gather(random_state).cpu(),
            **{
                f"sum:{name}": accelerator.gather(value[None]).cpu()
                for name, value in self.sums.items()
            },
        }
        return groups

    def _load_from_checkpoint(self, path: str, model: nn.Module | None = None) -> None:
        tensors = resume.read_tensors(Path(path), "parts")
        for name, parameter in self.trained().items():
            resume.put(parameter, tensors[name])

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        """Put back all but the parts and the random states; each process reads the same files."""
        if path is None:
            return
        place, parameters, optimizer = Path(path), self.trained(), self.optimizer
        state = resume.read_state(place)
        for key, value in resume.read_tensors(place, "optimizer").items():
            kind, _, name = key.partition(":")
            parameter = parameters[name]
            of_the_parameter = value.shape == parameter.shape and value.dim() > 0
            optimizer.state[parameter][kind] = (  # type: ignore[union-attr]
                resume.share_out(value, parameter) if of_the_parameter else value
            )
        for group, rate in zip(optimizer.param_groups, state["rates"], strict=True):  # type: ignore[union-attr]
            group["lr"] = rate
        self.lr_scheduler.load_state_dict(state["schedule"])  # type: ignore[union-attr]
        for name in ("rows", "skipped_steps", "good_steps", "term_norms", "best"):
            setattr(self, name, state[name])
        self.best_parts = resume.read_tensors(place, "best")
        for key, value in resume.read_tensors(place, "run").items():
            if key.startswith("sum:"):
                same = len(value) == self.accelerator.num_processes
                share = value[self.accelerator.process_index] if same else value.sum(0) / len(value)
                self.sums[key.removeprefix("sum:")] = share.to(self.accelerator.device)
        for one in self._stateful():
            if (kept := state["callbacks"].get(type(one).__name__)) is not None:
                one.load_state_dict(kept)

    def _load_rng_state(self, path: str | None) -> None:
        """Put back this process's random states; on another number of processes they stay anew."""
        states = resume.read_tensors(Path(path), "run").get("random") if path is not None else None
        if states is not None and len(states) == self.accelerator.num_processes:
            resume.set_random_state(states[self.accelerator.process_index])

    def _stateful(self) -> list[Any]:
        return [
            one
            for one in self.callback_handler.callbacks
            if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")
        ]


class _Turns(TrainerCallback):
    """Calls the trainer at its turns, and tells the Trainer when to measure, save and stop."""

    def __init__(self, trainer: LocalityTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the parts in the wrapped model, and measure before the first step."""
        self.trainer.find_parts_again()
        state.logging_steps = args.logging_steps  # a checkpoint brings its own
        if self.trainer.held_out and state.global_step == 0:
            self.trainer.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the objective where the run stands."""
        self.trainer.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find out a bad step here, where gradients are complete and unused."""
        self.trainer.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide what follows the step."""
        settings, trainer = self.trainer.settings, self.trainer
        step, last = state.global_step, state.global_step >= state.max_steps

        def turn(every: int | None) -> bool:
            return every is not None and step % every == 0

        if trainer.held_out and (last or turn(settings.eval_every)):
            control.should_evaluate = True
        trainer.stopped = trainer.stopped and not last
        if trainer.stopped:
            control.should_training_stop = True
        # After a bad step the weights are those of a checkpoint before, or what made it bad.
        good = not trainer.bad_in_a_row
        due = last or trainer.stopped or (good and turn(settings.save_every))
        control.should_save = due and trainer.checkpoints is not None


def training_arguments(settings: FinetuneSettings, output_dir: str | Path) -> TrainingArguments:
    """
    Make the Trainer's arguments, but for steps and learning rate: see `set_steps`.

    Making them joins the other processes of the run; they say how many there are, and which of
    them this one is. The settings' type is decided: see `with_compute_dtype`.

    Raises:
        DependencyError: a tracker that is not installed.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    trackers = list(settings.report_to or ())
    try:
        for tracker in get_reporting_integration_callbacks(trackers):
            tracker()
    except (ImportError, RuntimeError, AssertionError, ValueError) as error:
        raise DependencyError(
            f"report_to names {', '.join(trackers)}, which cannot be used ({error}); install what "
            "it needs, or leave it out"
        ) from error
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        # When to measure and to save is decided in `melinoe.finetune.trainer`.
        save_strategy="no",
        eval_strategy="no",
        seed=settings.seed,
        bf16=settings.compute_dtype == "bfloat16",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        report_to=trackers,
        disable_tqdm=True,
    )


def with_compute_dtype(settings: FinetuneSettings, stored: torch.dtype) -> FinetuneSettings:
    """Decide the type to compute in, where it is left open, by device and checkpoint."""
    if settings.compute_dtype != "auto":
        return settings
    narrow = torch.cuda.is_available() and stored.itemsize == 2
    return replace(settings, compute_dtype="bfloat16" if narrow else "float32")


def set_steps(
    arguments: TrainingArguments, settings: FinetuneSettings, steps: int, rates: Rates
) -> None:
    """Fill in what depends on the number of processes and on the model: steps and peak rate."""
    arguments.learning_rate = rates.routers
    arguments.max_steps = steps
    arguments.warmup_steps = int(settings.warmup * steps)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
