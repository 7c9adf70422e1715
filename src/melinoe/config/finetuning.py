"""How a model is fine-tuned."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from melinoe.config.setting import check_choices, setting
from melinoe.errors import TrainingError

# In place of a teacher's directory: the plain run, next tokens alone, trained first.
PLAIN = "plain"
# In place of a control's directory: the control, trained first.
CONTROL = "control"
# What hidden states weigh where a command line names a teacher and no weight.
MATCH = 10.0


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """
    How a model is fine-tuned for locality.

    The defaults are what measured best at equal compute: docs/method.md#what-the-defaults-rest-on.

    ``control()`` is the same run without the locality terms, the like-for-like comparison;
    ``plain()`` is the same run on next tokens alone, which is what a teacher is.

    Raises:
        TrainingError: a value that no run could use; the sentence names it.
    """

    capacity: float = setting(
        0.25, "cache size that the loss imagines", unit="share of a layer's experts"
    )
    lambda_cache: float = setting(1.0, "weight of the cache-simulation loss; 0 leaves it out")
    lambda_rank: float = setting(0.0, "weight of the anchor to the base router; 0 leaves it out")
    gamma: float = setting(
        0.9, "how slowly the imagined cache forgets: near 0 as LRU, 1 as LFU", unit="per token"
    )
    rho: float = setting(
        0.1, "margin by which the base router's order of two experts is kept", unit="probability"
    )
    cache_loss: str = setting(
        "resident",
        "resident: the experts with the highest counts are there, all others are not; clipped: "
        "by parts, an expert at most once; literal: as in the paper",
        choices=("clipped", "literal", "resident"),
    )
    cache_gradient: bool = setting(
        False, "let the gradient also flow through the imagined cache into earlier tokens"
    )
    anchor: str = setting(
        "rank",
        "what holds the router near the base, at the weight lambda_rank: rank matching, KL "
        "divergence, or nothing",
        choices=("rank", "kl", "none"),
    )
    rank_reduce: str = setting(
        "mean",
        "rank matching over pairs of experts: mean, or sum as in the paper",
        choices=("mean", "sum"),
    )
    reference: str = setting(
        "router",
        "whose order or distribution the anchor keeps: the base router on what the model in "
        "training shows it, or the base model's own pass over the same tokens",
        choices=("router", "pass"),
    )
    swap_margin: float | None = setting(
        None,
        "count a miss only where a resident expert is at most this much less likely; "
        "absent: count every miss in full",
        unit="nats",
    )
    capacity_curriculum: float = setting(
        0.0,
        "part of the run in which the imagined cache shrinks from all experts to its size",
        unit="share of the steps",
    )
    layer_capacity: tuple[float, ...] | None = setting(
        None, "capacity of each MoE layer in turn, in place of one for all"
    )
    layer_weight: tuple[float, ...] | None = setting(
        None, "factor on each MoE layer's cache and reuse terms, in turn; absent: 1"
    )
    cache_prior: float = setting(
        0.0,
        "strength of the cache prior under which completions are computed while training, so that "
        "experts learn to stand in for missing ones; 0: the routers' own choices",
    )
    lambda_reuse: float = setting(
        0.0, "weight of the reuse of the previous token's experts; 0 leaves it out"
    )
    lambda_distill: float = setting(
        0.0,
        "weight of the divergence of next-token distributions from the teacher's, the base "
        "model's if there is none; 0 leaves it out",
    )
    lambda_match: float = setting(
        0.0,
        "weight of the relative squared difference of hidden states from the teacher's, the base "
        "model's if there is none; 0 leaves it out, and with distillation a pass of the teacher",
    )
    # Measured: a tenth costs next to nothing in domain and most of what is forgotten elsewhere.
    lambda_replay: float = setting(
        0.1, "weight of the loss on anchor text beside the data; 0 leaves it out"
    )
    replay_loss: str = setting(
        "nll",
        "on anchor text: divergence from the base model's distributions, or next-token loss",
        choices=("kl", "nll"),
    )
    own_texts: int | None = setting(
        None,
        "texts that the base model writes where it is its own anchor text; absent: as many as the "
        "run reads, at most 512",
    )
    replay_batch_size: int = setting(2, "sequences of anchor text per forward pass")
    train: str = setting(
        "router+experts",
        "what is trained: the routers alone, or also low-rank updates of the experts, or of "
        "attention too",
        choices=("router", "router+experts", "router+experts+attention"),
    )
    lora_rank: int = setting(32, "rank of the update of each projection")
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
    batch_size: int = setting(8, "sequences (packed: rows) per device and forward pass")
    gradient_accumulation: int = setting(1, "forward passes per optimiser step")
    warmup: float = setting(0.05, "rising part of the schedule", unit="share of the steps")
    schedule: str = setting(
        "cosine", "how the learning rate falls", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = setting(0.0, "AdamW's decay of the trained parts")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    max_length: int = setting(512, "longest sequence, and with packing row", unit="tokens")
    packing: bool = setting(False, "put several examples into one row, kept apart")
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, more time"
    )
    compute_dtype: str = setting(
        "auto",
        "type that is computed in; frozen weights keep the checkpoint's, trained parts are "
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
    keep_checkpoints: int = setting(2, "newest checkpoints of the run that are kept")
    keep: str = setting(
        "last",
        "what is written in the end: the last weights, or the best on the held-out examples",
        choices=("last", "best"),
    )
    save: str = setting(
        "merged",
        "what is written in the end: a plain checkpoint, the adapter in PEFT's files, or both",
        choices=("merged", "adapter", "both"),
    )
    report_to: tuple[str, ...] | None = setting(
        None, "trackers of transformers' Trainer that are told too: tensorboard, wandb, ..."
    )
    max_bad_steps: int = setting(5, "non-finite losses in a row before the run stops")
    seed: int = setting(0, "decides the data order and the starting adapters")

    def __post_init__(self) -> None:
        for name in ("layer_capacity", "layer_weight"):  # a record in JSON gives lists
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(float(one) for one in value))
        if self.report_to is not None:
            object.__setattr__(self, "report_to", tuple(self.report_to))
        check_choices(self, TrainingError)
        capacities, weights = self.layer_capacity or (), self.layer_weight or ()
        for name, holds, want in (
            ("capacity", 0 < self.capacity <= 1, "in (0, 1], a share of a layer's experts"),
            ("lambda_cache", self.lambda_cache >= 0, "0 or more"),
            ("lambda_rank", self.lambda_rank >= 0, "0 or more"),
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"),
            ("rho", self.rho >= 0, "0 or more"),
            ("cache_prior", self.cache_prior >= 0, "0 or more"),
            ("lambda_reuse", self.lambda_reuse >= 0, "0 or more"),
            ("lambda_distill", self.lambda_distill >= 0, "0 or more"),
            ("lambda_match", self.lambda_match >= 0, "0 or more"),
            ("lambda_replay", self.lambda_replay >= 0, "0 or more"),
            ("swap_margin", self.swap_margin is None or self.swap_margin > 0, "above 0"),
            ("capacity_curriculum", 0 <= self.capacity_curriculum <= 1, "in [0, 1]"),
            ("layer_capacity", all(0 < one <= 1 for one in capacities), "shares in (0, 1]"),
            ("layer_weight", all(one >= 0 for one in weights), "0 or more each"),
            ("replay_batch_size", self.replay_batch_size >= 1, "1 or more"),
            (
                "cache_gradient",
                not (self.cache_gradient and self.cache_loss == "resident"),
                "off with the resident form, which has no such gradient (cache_loss: clipped has)",
            ),
            ("own_texts", self.own_texts is None or self.own_texts >= 1, "1 or more"),
            ("lora_rank", self.lora_rank >= 1, "1 or more"),
            ("learning_rate", self.learning_rate is None or self.learning_rate > 0, "above 0"),
            (
                "lora_learning_rate",
                self.lora_learning_rate is None or self.lora_learning_rate > 0,
                "above 0",
            ),
            ("steps", self.steps is None or self.steps >= 1, "1 or more"),
            ("epochs", self.epochs > 0, "above 0"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("gradient_accumulation", self.gradient_accumulation >= 1, "1 or more"),
            ("warmup", 0 <= self.warmup < 1, "in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0"),
            ("max_length", self.max_length >= 2, "2 or more"),
            ("log_every", self.log_every >= 1, "1 or more"),
            ("eval_every", (self.eval_every or 1) >= 1, "1 or more"),
            ("save_every", (self.save_every or 1) >= 1, "1 or more"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "1 or more"),
            ("max_bad_steps", self.max_bad_steps >= 1, "1 or more"),
        ):
            if not holds:
                raise TrainingError(f"{name} cannot be {getattr(self, name)}; it must be {want}")

    @property
    def is_taught(self) -> bool:
        """Whether a term compares with a teacher."""
        return self.lambda_distill > 0 or self.lambda_match > 0

    @property
    def is_control(self) -> bool:
        """Whether no locality term weighs anything."""
        return all(getattr(self, name) == 0 for name in _LOCALITY_WEIGHTS)

    @property
    def is_plain(self) -> bool:
        """Whether the run trains on next tokens alone."""
        others = any(getattr(self, name) for name in _OTHER_WEIGHTS)
        return self.is_control and not self.is_anchored and not others

    @property
    def is_anchored(self) -> bool:
        """Whether a term holds the routers near the base's."""
        return self.lambda_rank > 0 and self.anchor != "none"

    def control(self) -> "FinetuneSettings":
        """Leave out the locality terms alone: same teacher, anchors, data order, steps, seed."""
        off: dict[str, Any] = dict.fromkeys(_LOCALITY_WEIGHTS, 0.0)
        return replace(self, **off)

    def plain(self) -> "FinetuneSettings":
        """Leave out every term but next tokens: same data order, steps, seed."""
        off: dict[str, Any] = dict.fromkeys((*_OTHER_WEIGHTS, "lambda_rank"), 0.0)
        return replace(self.control(), **off)

    def deciding(self) -> dict[str, Any]:
        """
        Settings that decide the weights a run ends with, as JSON gives them back.

        Left out are those of reporting and saving, and those of terms that weigh nothing: two runs
        that agree here, on the same base and data, end alike.
        """
        idle = {*_BOOKKEEPING, *(() if self.keep == "best" else ("eval_every",))}
        if self.is_control:
            idle |= {*_LOCALITY_WEIGHTS, *_OF_LOCALITY}
        if not self.is_anchored:
            idle |= {"lambda_rank", *_OF_ANCHORS}
        if not self.lambda_replay:
            idle |= {*_OF_REPLAY}
        known = json.loads(json.dumps(asdict(self)))
        return {name: value for name, value in known.items() if name not in idle}


_LOCALITY_WEIGHTS = ("lambda_cache", "cache_prior", "lambda_reuse")
_OTHER_WEIGHTS = ("lambda_distill", "lambda_match", "lambda_replay")
# What only the locality terms, the anchors or replay read.
_OF_LOCALITY = (
    "capacity", "gamma", "cache_loss", "cache_gradient", "swap_margin", "capacity_curriculum",
    "layer_capacity", "layer_weight",
)  # fmt: skip
_OF_ANCHORS = ("anchor", "rho", "rank_reduce", "reference")
_OF_REPLAY = ("replay_loss", "replay_batch_size", "own_texts")
_BOOKKEEPING = (
    "log_every", "save_every", "keep_checkpoints", "save", "report_to", "max_bad_steps",
    "gradient_checkpointing",
)  # fmt: skip
