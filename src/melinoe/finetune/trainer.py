"""
transformers' Trainer with the locality objective: one step, the log, measuring, checkpoints.

Why not TRL's SFTTrainer: docs/architecture.md, finetune.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from melinoe.config import FinetuneSettings
from melinoe.data import IGNORED, Collator, Encoded
from melinoe.errors import DependencyError, TrainingError, WriteError
from melinoe.finetune import resume
from melinoe.finetune.objective import Objective
from melinoe.finetune.parts import TrainedParts
from melinoe.finetune.rates import Rates
from melinoe.finetune.stream import ExpertStream
from melinoe.moe.finite import broken_weight

log = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_MOST_BAD_STEPS = 5  # non-finite losses in a row before a run stops
_COUNTS = ("rows", "skipped_steps", "good_steps")  # kept in a checkpoint as they are


class LocalityTrainer(Trainer, TrainerCallback):
    """
    Trains on the objective's total, and logs each of its terms; its own callback.

    All terms are means over the completion tokens of the whole optimiser step: over its accumulated
    batches and over all processes. A step whose loss or gradient is not finite on any process
    changes no weight; it is counted, and five in a row end the run.

    *rows* is the log: one dictionary per logged step, with the mean of each term since the last and
    what the step read of experts in a store, and one per measurement of the held-out examples.
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
        progress: Progress | None,
        checkpoints: Path | None,
        identity: dict[str, Any],
        stop: resume.StopRequest,
        stream: ExpertStream | None = None,
        **trainer_options: Any,
    ):
        self.settings, self.rates, self.locality, self.parts = settings, rates, objective, parts
        super().__init__(**trainer_options)
        self.remove_callback(PrinterCallback)
        self.held_out, self.padding = held_out, padding
        self.progress, self.checkpoints = progress, checkpoints
        self.identity, self.stop, self.stopped = identity, stop, False
        self.stream, self.read_before = stream, 0  # reads up to the step that runs
        # Whatever the model takes: its loss is computed here, with the denominator of the step.
        self.model_accepts_loss_kwargs = True
        self.rows: list[dict[str, Any]] = []
        self.sums: dict[str, Tensor] = {}  # of the good steps since the last row, here
        self.good_steps = self.skipped_steps = self.bad_in_a_row = 0
        self._pending: dict[str, Tensor] = {}  # of the step that runs
        self._bad_now = False
        self.add_callback(self)

    # ---- one step ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the trained parts."""
        if self.optimizer is None:
            groups = [{"params": list(self.parts.router.values()), "lr": self.rates.routers}]
            if self.parts.lora:
                groups.append({"params": list(self.parts.lora.values()), "lr": self.rates.low_rank})
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the combined loss of one batch; see `Objective`."""
        terms = self.locality.measure(model, inputs, num_items_in_batch, training=True)
        self._bad_now |= not bool(torch.isfinite(terms.total))
        _add(self._pending, terms.detached())
        # Gradients are averaged over processes, but the terms are shares of a sum over them.
        loss = terms.total * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the gradients of a bad step and count it; they are complete here, and unused."""
        pending, self._pending = self._pending, {}
        if not self._is_bad_anywhere():
            self.bad_in_a_row = 0
            self.good_steps += 1
            _add(self.sums, pending)
            return
        self.skipped_steps += 1
        self.bad_in_a_row += 1
        for parameter in self.parts.all():
            parameter.grad = None
        step = state.global_step + 1
        broken = self._broken_weight() if self.skipped_steps == 1 else None
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
                self._save_checkpoint(self.plain_model(), None)
                kept = f"; what was trained before is kept in {self.checkpoints}"
            raise TrainingError(
                f"the loss was not finite {self.bad_in_a_row} steps in a row, up to step {step}; "
                f"lower learning_rate or lambda_cache, or look for broken rows in the data{kept}"
            )

    def _is_bad_anywhere(self) -> bool:
        """Whether the step is bad on any process; they also agree on whether to stop."""
        gradients = [_local(p.grad) for p in self.parts.all() if p.grad is not None]
        sums = torch.stack([gradient.sum().to(self.accelerator.device) for gradient in gradients])
        bad = self._bad_now or not bool(torch.isfinite(sums).all())
        flags = torch.tensor([float(bad), float(self.stop.asked)], device=self.accelerator.device)
        bad, self.stopped = (self.accelerator.reduce(flags, reduction="sum") > 0).tolist()
        self._bad_now = False
        return bad

    def _broken_weight(self) -> str | None:
        """Name a weight that holds no number, each process of its own share; all must call."""
        found = gather_object([broken_weight(self.plain_model())])
        return next(filter(None, found), None)

    # ---- the run's turns ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the parts in the wrapped model, and measure before the first step."""
        now = self.trained()
        for group in (self.parts.router, self.parts.lora):
            group |= {name: now[name] for name in group}  # sharding makes new parameters
        state.logging_steps = args.logging_steps  # a checkpoint brings its own
        if self.held_out and state.global_step == 0:
            self.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the objective where the run stands; each process has its own batches."""
        turn = state.global_step * args.world_size + args.process_index
        self.locality.next_replayed = turn * args.gradient_accumulation_steps
        if self.stream is not None:
            self.read_before = self.stream.reads.used

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide what follows the step."""
        last = state.global_step >= state.max_steps

        def turn(every: int | None) -> bool:
            return every is not None and state.global_step % every == 0

        control.should_evaluate |= bool(self.held_out) and (last or turn(self.settings.eval_every))
        self.stopped = self.stopped and not last
        control.should_training_stop |= self.stopped
        # After a bad step the weights are those of a checkpoint before, or what made it bad.
        good = not self.bad_in_a_row
        due = last or self.stopped or (good and turn(self.settings.save_every))
        control.should_save = due and self.checkpoints is not None

    # ---- the log, and measuring ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms to what the Trainer logs."""
        if "loss" in logs and self.good_steps:
            sums = torch.stack(list(self.sums.values()))
            means = (self.accelerator.reduce(sums, reduction="sum") / self.good_steps).tolist()
            row = {
                "step": self.state.global_step,
                **dict(zip(self.sums, means, strict=True)),
                "grad_norm": float(logs.get("grad_norm", 0.0)),
                "learning_rate": float(logs.get("learning_rate", 0.0)),
                "skipped_steps": self.skipped_steps,
            }
            if self.stream is not None:
                row["expert_reads"] = self.stream.reads.used - self.read_before
            self.sums, self.good_steps = {}, 0
            self._tell(row)
            logs = {**logs, **row, "loss": row["total"]}
        super().log({k: v for k, v in logs.items() if _is_json(v)}, start_time)

    def _tell(self, row: dict[str, Any]) -> None:
        row = {key: value if _is_json(value) else None for key, value in row.items()}
        self.rows.append(row)
        if self.progress is not None and self.is_world_process_zero():
            self.progress({**row, "steps": self.state.max_steps})

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Log each term's mean over the held-out examples' completions, as ``eval_<term>``."""
        model, accelerator, size = self.plain_model(), self.accelerator, self.settings.batch_size
        was_training = model.training
        model.eval()
        ordered = sorted(self.held_out or eval_dataset, key=len)
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        sums: dict[str, Tensor] = {}
        tokens = 0
        # Sharded weights are gathered by all processes together: each takes as many passes as any.
        for first in range(0, len(batches), accelerator.num_processes):
            mine = first + accelerator.process_index
            batch = self.padding(batches[mine if mine < len(batches) else 0])
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            with torch.no_grad(), self.compute_loss_context_manager():
                terms = self.locality.measure(model, batch, training=False)
            count = int((batch["labels"] != IGNORED).sum()) if mine < len(batches) else 0
            _add(sums, terms.detached(), count)
            tokens += count
        model.train(was_training)
        found = torch.tensor([*map(float, sums.values()), tokens], dtype=torch.float64)
        found = accelerator.reduce(found.to(accelerator.device), reduction="sum")
        *values, of_all = found.tolist()
        if not all(map(math.isfinite, values)):
            why = self._broken_weight() or "lower learning_rate or lambda_cache"
            raise TrainingError(f"the loss on held-out examples is not finite: {why}")
        means = [value / of_all for value in values]
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in zip(sums, means, strict=True)}
        self._tell({"step": self.state.global_step, **metrics})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # ---- checkpoints ----

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by the names they had before any wrapping."""
        now = {
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
            for name, parameter in self.plain_model().named_parameters()
        }
        return {name: now[name] for name in (*self.parts.router, *self.parts.lora)}

    def plain_model(self) -> nn.Module:
        """Return the model without what accelerate wrapped around it."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save trained parts only, without pickle, whole or not at all; all processes must call."""
        assert self.checkpoints is not None and self.optimizer is not None
        finished = self.state.global_step >= self.state.max_steps  # such a one needs parts alone
        parameters = self.trained()
        tensors = {"parts": {name: resume.gather(one) for name, one in parameters.items()}}
        processes: list[Any] = []
        if not finished:
            tensors["optimizer"] = {
                f"{key}:{name}": resume.gather(value)
                for name, parameter in parameters.items()
                for key, value in self.optimizer.state.get(parameter, {}).items()
            }
            sums = {name: float(value) for name, value in self.sums.items()}
            processes = gather_object([{"random": resume.random_state(), "sums": sums}])
        if not self.is_world_process_zero():
            return
        state = {
            "run": self.identity,
            "finished": finished,
            "schedule": self.lr_scheduler.state_dict(),  # type: ignore[union-attr]
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "processes": processes,
            **{name: getattr(self, name) for name in _COUNTS},
        }
        text = json.dumps(dataclasses.asdict(self.state), indent=1, sort_keys=True) + "\n"
        more = bool(self.bad_in_a_row)  # good ones are not given up for weights that broke the loss
        step = self.state.global_step
        try:
            resume.write_checkpoint(self.checkpoints, step, tensors, state, text, more=more)
        except WriteError as error:
            # Going on loses nothing that stopping would keep.
            log.warning("%s; the run goes on, and the checkpoints before are kept", error)

    @torch.no_grad()
    def _load_from_checkpoint(self, path: str, model: nn.Module | None = None) -> None:
        tensors = resume.read_tensors(Path(path), "parts")
        for name, parameter in self.trained().items():
            parameter.copy_(resume.share_out(tensors[name], parameter))

    def _load_optimizer_and_scheduler(self, path: str | None) -> None:
        """Put back all but the parts and the random states; each process reads the same files."""
        if path is None:
            return
        assert self.optimizer is not None and self.lr_scheduler is not None
        parameters, state = self.trained(), resume.read_state(Path(path))
        for key, value in resume.read_tensors(Path(path), "optimizer").items():
            kind, _, name = key.partition(":")
            parameter = parameters[name]
            shaped = value.shape == parameter.shape and value.dim() > 0
            own = resume.share_out(value, parameter) if shaped else value
            self.optimizer.state[parameter][kind] = own
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self.lr_scheduler.load_state_dict(state["schedule"])
        for name in _COUNTS:
            setattr(self, name, state[name])
        # On another number of processes each takes an equal share of the sums.
        mine = self._mine(state["processes"])
        states, share = ([mine], 1) if mine else (state["processes"], self.args.world_size)
        for one in states:
            double = torch.float64
            more = {n: torch.tensor(v / share, dtype=double) for n, v in one["sums"].items()}
            _add(self.sums, {k: v.to(self.accelerator.device) for k, v in more.items()})

    def _load_rng_state(self, path: str | None) -> None:
        """Put back this process's random states; on another number of processes they stay anew."""
        if path is not None and (mine := self._mine(resume.read_state(Path(path))["processes"])):
            resume.set_random_state(mine["random"])

    def _mine(self, processes: list[dict[str, Any]]) -> dict[str, Any] | None:
        """This process's own state, if the checkpoint is of as many processes."""
        same = len(processes) == self.args.world_size
        return processes[self.args.process_index] if same else None


def training_arguments(settings: FinetuneSettings, output_dir: str | Path) -> TrainingArguments:
    """Make the Trainer's arguments, but for `set_steps`; joins the other processes."""
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
        save_strategy="no",  # `on_step_end` decides
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


def set_steps(
    arguments: TrainingArguments, settings: FinetuneSettings, steps: int, rates: Rates
) -> None:
    """Fill in what depends on the number of processes and on the model: steps and peak rate."""
    arguments.learning_rate = rates.routers
    arguments.max_steps = steps
    arguments.warmup_steps = int(settings.warmup * steps)


def sharding() -> str | None:
    """Name what ``accelerate launch`` was asked to shard the model with."""
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("true", "1"):
            return name
    return None


def is_sharded(arguments: TrainingArguments) -> bool:
    """Whether FSDP shards the model, by the Trainer's arguments or by ``accelerate launch``."""
    return bool(arguments.fsdp) or sharding() == "FSDP"


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], times: int = 1) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.double() * times


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
