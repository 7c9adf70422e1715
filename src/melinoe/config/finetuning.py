"""Settings of fine-tuning."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from melinoe.config.setting import check_settings, setting
from melinoe.errors import TrainingError

# In place of a control's directory: the control, trained first.
CONTROL = "control"


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """
    Settings of a run that trains for locality.

    See docs/method.md#what-the-defaults-rest-on for why these are the defaults.

    ``control()`` is the same run without the locality terms, the like-for-like comparison;
    ``plain()`` is the same run on next tokens alone.

    Raises:
        TrainingError: a value that no run could use; the sentence names it.
    """

    # Form and forgetting of the imagined cache: docs/study.md#the-papers-forms.
    capacity: float = setting(
        0.25, "size of the cache to train for", unit="share of a layer's experts"
    )
    lambda_cache: float = setting(1.0, "weight of the cache-simulation loss; 0 leaves it out")
    lambda_concentration: float = setting(
        0.0,
        "weight of the loss that asks for few experts within each sequence and for all of them "
        "over the sequences of a batch; 0 leaves it out",
    )
    lambda_rank: float = setting(
        0.0, "weight of rank matching, the paper's second term; 0 leaves it out"
    )
    gamma: float = setting(
        0.9, "memory of the imagined cache: near 0 as LRU, 1 as LFU", unit="per token"
    )
    rho: float = setting(
        0.1,
        "margin by which rank matching keeps the base router's order of two experts",
        unit="probability",
    )
    cache_loss: str = setting(
        "resident",
        "form of the imagined cache. resident: it holds the experts with the highest counts; "
        "clipped: shares of experts, each at most one; literal: shares, as in the paper",
        choices=("clipped", "literal", "resident"),
    )
    # Measured: a tenth costs next to nothing in domain and most of what is forgotten elsewhere.
    lambda_replay: float = setting(
        0.1, "weight of the loss on anchor text beside the data; 0 leaves it out"
    )
    own_texts: int | None = setting(
        None,
        "let the base model write so many texts as anchor text, where none is given; absent: as "
        "many as the run reads, at most 512",
    )
    train: str = setting(
        "router+experts",
        "train the routers alone, or also low-rank updates of the experts, or of attention too",
        choices=("router", "router+experts", "router+experts+attention"),
    )
    # Measured: docs/method.md#what-the-defaults-rest-on; the rule: melinoe.finetune.rates.
    lora_rank: int | None = setting(
        None,
        "rank of the update of each projection; absent: 128 over the experts per token, at most 32",
    )
    lora_alpha: float = setting(16.0, "the update is multiplied by this over the rank")
    # Measured: docs/method.md#learning-rates; the rules: melinoe.finetune.rates.
    learning_rate: float | None = setting(
        None, "peak learning rate of the routers; absent: 0.55 over the model's hidden size"
    )
    lora_learning_rate: float | None = setting(
        None,
        "peak learning rate of the low-rank updates; absent: that of the routers if it is given, "
        "else 5e-4 times (2000 over the hidden size) to the power of 0.781",
    )
    steps: int | None = setting(None, "optimiser steps; absent: as many as the epochs have")
    epochs: float = setting(1.0, "passes over the data when steps is absent")
    batch_size: int = setting(8, "sequences per device and forward pass")
    gradient_accumulation: int = setting(1, "forward passes per optimiser step")
    warmup: float = setting(
        0.05, "part of the run in which the learning rate rises", unit="share of the steps"
    )
    schedule: str = setting(
        "cosine", "fall of the learning rate after warmup", choices=("cosine", "linear", "constant")
    )
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_length: int = setting(512, "longest sequence", unit="tokens")
    gradient_checkpointing: bool | None = setting(
        None,
        "recompute layers in the backward pass: less memory, more time, the same numbers; absent: "
        "on the CPU, where the experts of one would keep more than 64 MiB, and within a budget",
    )
    compute_dtype: str = setting(
        "auto",
        "type to compute in; frozen weights keep the checkpoint's, trained parts are "
        "float32; auto: bfloat16 on a GPU for a checkpoint of 16 bits, else float32, in which "
        "a CPU is faster",
        choices=("auto", "float32", "bfloat16"),
    )
    log_every: int = setting(10, "steps between log lines")
    eval_every: int | None = setting(
        None,
        "steps between measurements of the held-out examples; absent: before and after the run",
    )
    save_every: int | None = setting(
        None, "steps between checkpoints of the run; absent: only when it is interrupted"
    )
    save: str = setting(
        "merged",
        "write a plain checkpoint, the adapter in PEFT's files, or both",
        choices=("merged", "adapter", "both"),
    )
    report_to: tuple[str, ...] | None = setting(
        None, "also report to trackers of transformers' Trainer: tensorboard, wandb, ..."
    )
    seed: int = setting(0, "seed of the data order and of the starting values")

    def __post_init__(self) -> None:
        if self.report_to is not None:  # a record in JSON gives a list
            object.__setattr__(self, "report_to", tuple(self.report_to))
        check_settings(self, _WITHIN, TrainingError)

    @property
    def is_control(self) -> bool:
        """Whether no locality term weighs anything."""
        return not any(getattr(self, name) for name in _LOCALITY)

    def control(self) -> "FinetuneSettings":
        """Leave out the locality terms alone: same replayed text, data order, steps, seed."""
        off: dict[str, Any] = dict.fromkeys(_LOCALITY, 0.0)
        return replace(self, **off)

    def plain(self) -> "FinetuneSettings":
        """Leave out every term but next tokens: same data order, steps, seed."""
        off: dict[str, Any] = dict.fromkeys(_WEIGHTS, 0.0)
        return replace(self, **off)

    def deciding(self) -> dict[str, Any]:
        """
        Return the settings that decide the weights a run ends with, as JSON gives them back.

        Two runs that agree here, on the same base and data, end alike.
        """
        weigh = {name for name in _WEIGHTS if getattr(self, name)}
        idle = {name for name, weights in _READ_FOR.items() if not weigh & {*weights}}
        idle |= {*_BOOKKEEPING}
        known = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in known.items() if name not in idle}


# The interval that a setting must be in; one that is None is in every interval.
_WITHIN = {
    "(0, 1]": ("capacity",),
    "[0, 1]": ("gamma",),
    "[0, 1)": ("warmup",),
    "[0, inf)": ("lambda_cache", "lambda_concentration", "lambda_rank", "rho", "lambda_replay"),
    "(0, inf)": ("epochs", "max_grad_norm"),
    "(0, 100]": ("learning_rate", "lora_learning_rate"),
    "[0, 4294967295]": ("seed",),
    "[1, inf)": (
        "own_texts", "lora_rank", "steps", "batch_size", "gradient_accumulation", "log_every",
        "eval_every", "save_every",
    ),
    "[2, inf)": ("max_length",),
}  # fmt: skip
_LOCALITY = ("lambda_cache", "lambda_concentration")
_WEIGHTS = (*_LOCALITY, "lambda_rank", "lambda_replay")
# Settings that only some terms read, and the weights of those.
_READ_FOR = {
    "capacity": _LOCALITY,
    "gamma": ("lambda_cache",),
    "cache_loss": ("lambda_cache",),
    "rho": ("lambda_rank",),
    "own_texts": ("lambda_replay",),
}
_BOOKKEEPING = (
    "log_every", "eval_every", "save_every", "save", "report_to", "gradient_checkpointing",
)  # fmt: skip
