"""Learn from an earlier run on the same base: its adapter, put in the place of what trains."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from melinoe.checkpoint.metadata import read_metadata
from melinoe.errors import TrainingError
from melinoe.finetune.adapter import CONFIG, Adapter, read_adapter
from melinoe.finetune.parts import AttentionUpdates, LinearUpdate, LowRank, TrainedParts
from melinoe.moe.base_routers import BaseRouters
from melinoe.moe.experts import ExpertsLayer
from melinoe.moe.routing import fingerprint

ADAPTER_DIRECTORY = "adapter"
"""Name of the adapter's directory in a checkpoint that was saved with it."""


class Teacher:
    """
    An adapter of the same base, put for a pass in the place of what is being trained.

    Both share every frozen weight, so a teacher costs the memory of its routers and updates, and a
    forward pass without gradients per batch.

    Args:
        adapter: From `read_teacher`.
        parts: Of the model in training, before or after any step.
        layers: Of the same.
        device: Where passes will run.

    Raises:
        TrainingError: the teacher changes experts or other projections, and this run does not.
    """

    def __init__(
        self,
        adapter: Adapter,
        parts: TrainedParts,
        layers: Sequence[ExpertsLayer],
        device: torch.device,
    ) -> None:
        if adapter.factors and parts.updates is None:
            raise TrainingError(
                "the teacher's experts were trained, but this run trains routers alone; train the "
                "experts too, or give a teacher whose routers alone were trained"
            )
        trained = () if parts.attention is None else parts.attention.projections
        if beyond := [name for name in adapter.linears if name not in trained]:
            raise TrainingError(
                f"the teacher's {beyond[0]} was trained, but this run does not train it; train "
                "attention too (train: router+experts+attention), or give another teacher"
            )
        self.routers = BaseRouters(parts.routers, adapter.routers)
        self._parts = parts
        self._experts = [_frozen(layer, adapter, device) for layer in layers]
        self._attention = _frozen_attention(parts.attention, adapter, device)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it, the teacher's updates act in place of those in training."""
        with ExitStack() as stack:
            if self._parts.updates is not None:
                stack.enter_context(self._parts.updates.replaced(self._experts))
            if self._parts.attention is not None:
                stack.enter_context(self._parts.attention.replaced(self._attention))
            yield


def read_teacher(directory: str | Path, model: object) -> Adapter:
    """
    Read the trained parts of an earlier run on the base *model*.

    Args:
        directory: What ``melinoe finetune --save adapter`` or ``both`` wrote, or PEFT.
        model: The base, loaded; not changed.

    Raises:
        CheckpointError: no adapter there, or none of this base's shapes.
        TrainingError: it was trained on another base.
    """
    path = Path(directory).expanduser()
    if (path / ADAPTER_DIRECTORY / CONFIG).is_file():  # beside a checkpoint
        path = path / ADAPTER_DIRECTORY
    adapter = read_adapter(path, model)  # type: ignore[arg-type]
    wanted = read_metadata(path).get("base_fingerprint")
    if wanted is not None and wanted != fingerprint(model):  # type: ignore[arg-type]
        raise TrainingError(
            f"the teacher in {path} was trained on another base model: their routers differ; give "
            "a run on this base, or none"
        )
    return adapter


def teacher_fingerprint(adapter: Adapter) -> str:
    """Name an adapter's numbers: sha256, 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{adapter.scaling}".encode())
    tensors = {
        **{f"{n}.{k}": t for n, state in adapter.routers.items() for k, t in state.items()},
        **{
            f"{n}.{p}.{i}": t
            for n, projections in adapter.factors.items()
            for p, pair in projections.items()
            for i, t in enumerate(pair)
        },
        **{f"{n}.{i}": t for n, pair in adapter.linears.items() for i, t in enumerate(pair)},
    }
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _frozen(layer: ExpertsLayer, adapter: Adapter, device: torch.device) -> LowRank | None:
    """Make the teacher's update of one layer; none where it leaves the experts alone."""
    factors = adapter.factors.get(layer.name)
    if factors is None:
        return None
    alpha = adapter.scaling * adapter.rank
    made = LowRank(layer, adapter.rank, alpha, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in made.names:
            if name in factors:
                # Not copied into: PEFT may give one projection another rank than the rest.
                made.lora_A[name].data = factors[name][0].float().clone()
                made.lora_B[name].data = factors[name][1].float().clone()
    return made.requires_grad_(False).to(device)


def _frozen_attention(
    updates: AttentionUpdates | None, adapter: Adapter, device: torch.device
) -> list[LinearUpdate | None]:
    """Make the teacher's update of each projection in training; none where it has none."""
    if updates is None:
        return []
    alpha, made = adapter.scaling * adapter.rank, []
    for name, projection in updates.projections.items():
        factors, one = adapter.linears.get(name), None
        if factors is not None:
            one = LinearUpdate(projection, adapter.rank, alpha, torch.Generator())
            with torch.no_grad():
                one.lora_A.data = factors[0].float().clone()
                one.lora_B.data = factors[1].float().clone()
            one.requires_grad_(False).to(device)
        made.append(one)
    return made
