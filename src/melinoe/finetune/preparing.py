"""What a model is given for the time of its training, and gets back afterwards."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune.parts.adapters import TrainedParts
from melinoe.finetune.widening import Widened
from melinoe.malloc import keep_freed_memory
from melinoe.moe.experts import family


class ReadyModel:
    """
    A model in the types and with the switches that its training needs; it can be made plain again.

    Args:
        model: Changed in place.
        settings: ``train``, ``compute_dtype`` and ``gradient_checkpointing`` are read.
    """

    def __init__(self, model: Any, settings: FinetuneSettings) -> None:
        self._model, self._recomputes = model, settings.gradient_checkpointing
        self._types = {name: tensor.dtype for name, tensor in tensors(model)}
        if not torch.cuda.is_available():
            keep_freed_memory()
        self._widened = None if settings.compute_dtype == "bfloat16" else Widened(model)
        if self._widened is not None and settings.train != "router":
            self._widened.make_way()  # for the function that adds the updates
        self._configs = switch_off_balancing(model)
        # The Trainer switches the key-value cache off in the config, and would leave it so.
        if hasattr(model.config, "use_cache"):
            self._configs.append((model.config, {"use_cache": model.config.use_cache}))

    def recompute(self) -> None:
        """Let activations be recomputed from now on, if that is asked for."""
        if self._recomputes:
            recompute(self._model, True)

    def switch_back(self) -> None:
        """Configs and switches are as they were."""
        if self._recomputes:
            recompute(self._model, False)
        for config, values in self._configs:
            for key, value in values.items():
                setattr(config, key, value)

    def make_plain(self, parts: TrainedParts) -> None:
        """Updates become the model's own weights; tensors get back the types they came with."""
        parts.merge(self._model)
        if self._widened is not None:
            self._widened.undo()
        self._model.requires_grad_(True).eval()
        for name, tensor in tensors(self._model):
            tensor.data = tensor.data.to(self._types.get(name, tensor.dtype))


def recompute(model: Any, on: bool) -> None:
    """Switch gradient checkpointing, by the name that this version of transformers has for it."""
    word = "enable" if on else "disable"
    switch = getattr(model, f"activation_checkpointing_{word}", None) or getattr(
        model, f"gradient_checkpointing_{word}"
    )
    try:
        # Not reentrant: what a layer records inside must stay in the graph.
        switch(*([{"use_reentrant": False}] if on else []))
    except ValueError:
        raise TrainingError(
            f"{family(model)} cannot recompute its activations; leave gradient_checkpointing out"
        ) from None


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def switch_off_balancing(model: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Keep transformers from adding its load-balancing loss; what the configs said before."""
    before, pending = [], [model.config]
    while pending:
        config = pending.pop()
        pending += [getattr(config, key) for key in config.sub_configs if hasattr(config, key)]
        off = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
        present = {key: getattr(config, key) for key in off if hasattr(config, key)}
        before.append((config, present))
        for key in present:
            setattr(config, key, off[key])
    return before
