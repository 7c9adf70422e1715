"""What a model is given for the time of its training, and gets back afterwards."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from melinoe.errors import TrainingError
from melinoe.moe.experts import family


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
