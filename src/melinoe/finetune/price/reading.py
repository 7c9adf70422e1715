"""
What a model in training makes of held-out texts: the cost of each, and the experts it chose.

The texts are read, not generated: every model sees the same tokens, so its choices and its loss can
be compared text by text with another model's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from melinoe.cache.counters import COMPLETION
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace, TraceBuilder
from melinoe.config import FinetuneSettings
from melinoe.data import IGNORED, Collator, Encoded
from melinoe.errors import TrainingError
from melinoe.finetune.forward import logits_of, model_outputs
from melinoe.moe.finite import broken_weight
from melinoe.moe.routing import Router, RoutingRecorder
from melinoe.stats import Estimate, bootstrap, paired_difference, paired_ratio

Floats = NDArray[np.float64]
POLICIES = ("lru", "lfu")


@dataclass(frozen=True)
class Cost:
    """
    What each of several texts cost a model.

    Attributes:
        nll: float64 ``(texts,)``, summed over completion tokens, in nats.
        tokens: float64 ``(texts,)``, how many they are.
    """

    nll: Floats
    tokens: Floats

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.nll.sum() / self.tokens.sum())

    def gap(self, other: "Cost", level: float = 0.95) -> Estimate:
        """Ours minus *other*'s nats per token on the same texts, paired."""
        return paired_difference(self.nll, other.nll, self.tokens, other.tokens, level)

    def increase(self, other: "Cost") -> Estimate:
        """Our perplexity over *other*'s, minus 1, on the same texts, paired."""
        return paired_difference(self.nll, other.nll, self.tokens, other.tokens, transform=np.expm1)

    def to_dict(self) -> dict[str, list[float]]:
        """As a record holds it."""
        return {"nll": self.nll.tolist(), "tokens": self.tokens.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> "Cost":
        """Read what `to_dict` wrote."""
        return cls(np.asarray(values["nll"], float), np.asarray(values["tokens"], float))


@torch.no_grad()
def read(
    model: nn.Module,
    texts: Sequence[Encoded],
    settings: FinetuneSettings,
    routers: Sequence[Router] = (),
) -> tuple[Cost, Trace | None]:
    """
    Read *texts*: their cost and, of *routers*, what they chose as the trace of a generation.

    Args:
        model: In any mode, which it is left in; with its updates on.
        texts: At least one with a completion.
        settings: ``batch_size`` and ``compute_dtype``.
        routers: Whose choices are wanted; none: no trace.

    Cost: one forward pass over the texts, on each process that calls.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    collate, order = Collator(0), sorted(range(len(texts)), key=lambda i: len(texts[i]))
    nll, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    choices: list[list[np.ndarray]] = [[] for _ in texts]
    recorder = RoutingRecorder(list(routers))
    for start in range(0, len(order), settings.batch_size):
        rows = order[start : start + settings.batch_size]
        batch = {k: v.to(device) for k, v in collate([texts[i] for i in rows]).items()}
        narrow = settings.compute_dtype == "bfloat16"
        with recorder, torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            logits = logits_of(model, model_outputs(model, batch))
            chosen = recorder.take() if routers else []
        labels = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        nll[rows] = losses.double().sum(1).cpu().numpy()
        broken = None if np.isfinite(nll[rows]).all() else broken_weight(model)
        if broken is not None:  # else it is the run's own doing, and its price is infinite
            raise TrainingError(f"the loss of a held-out text is not finite, because {broken}")
        tokens[rows] = (labels != IGNORED).sum(1).cpu().numpy()
        for layer in chosen:
            index = layer.top_k_index.view(*batch["labels"].shape, -1).cpu().numpy()
            for row, text in enumerate(rows):
                choices[text].append(index[row, : len(texts[text])])
    model.train(was_training)
    trace = _trace(texts, choices, routers) if routers else None
    return Cost(nll, tokens), trace


def _trace(
    texts: Sequence[Encoded], choices: list[list[np.ndarray]], routers: Sequence[Router]
) -> Trace:
    """One forward pass per prompt, then one per completion token, as if generated."""
    width = max(layer.shape[-1] for layer in choices[0])
    experts = max(router.num_experts for router in routers)
    builder = TraceBuilder(len(routers), experts, width)
    for number, (text, layers) in enumerate(zip(texts, choices, strict=True)):
        rows = np.full((len(text), len(layers), width), -1)
        for place, (layer, router) in enumerate(zip(layers, routers, strict=True)):
            real = np.where(layer < router.num_experts, layer, -1)
            rows[:, place, : layer.shape[-1]] = real
        at = 0
        while at < len(text):
            end = at + 1
            if not text.completion_mask[at]:
                while end < len(text) and not text.completion_mask[end]:
                    end += 1
            kind = COMPLETION_ROW if text.completion_mask[at] else PROMPT_ROW
            builder.add_forward(rows[at:end], number, kind)
            at = end
    return builder.trace()


@dataclass(frozen=True)
class Loads:
    """
    What each text's completion would have cost a cache that is cold before it.

    Attributes:
        loads: Policy to float64 ``(texts,)``, experts loaded, all layers.
        tokens: float64 ``(texts,)``.
    """

    loads: Mapping[str, Floats]
    tokens: Floats

    @classmethod
    def of(cls, trace: Trace, slots: int) -> "Loads":
        """Simulate *trace* with *slots* of each layer."""
        loads = {}
        for policy in POLICIES:
            done = simulate(trace, slots, policy, reset_between_sequences=True).per_sequence
            loads[policy] = np.asarray([float(one.loads[COMPLETION].sum()) for one in done])
        return cls(loads, np.asarray([float(one.tokens[COMPLETION]) for one in done]))

    def per_token(self) -> dict[str, dict[str, float]]:
        """Estimates of the transfers per token, by policy."""
        return {k: bootstrap(v, self.tokens).to_dict() for k, v in self.loads.items()}

    def fewer_than(self, other: "Loads") -> dict[str, dict[str, float]]:
        """How many times fewer transfers than *other*, paired; no policy that needs none."""
        return {
            policy: paired_ratio(other.loads[policy], own, self.tokens, self.tokens).to_dict()
            for policy, own in self.loads.items()
            if own.sum() > 0
        }

    def to_dict(self) -> dict[str, Any]:
        """As a record holds it."""
        return {
            "loads": {k: v.tolist() for k, v in self.loads.items()},
            "tokens": list(self.tokens),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Loads":
        """Read what `to_dict` wrote."""
        loads = {name: np.asarray(one, float) for name, one in values["loads"].items()}
        return cls(loads, np.asarray(values["tokens"], float))
