"""
An adapter: what fine-tuning trained, without the model it was trained on, in PEFT's files.

``adapter_model.safetensors`` holds the factors of the experts' updates and, whole, the routers;
``adapter_config.json`` names the updated parameters (``target_parameters``) and the routers
(``modules_to_save``), each by its full name. ``PeftModel.from_pretrained`` takes the directory as
it is. Routers are kept in float32: what a checkpoint in bfloat16 must round is exact here.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from melinoe.errors import CheckpointError
from melinoe.finetune.parts.adapters import TrainedParts
from melinoe.finetune.parts.low_rank import PROJECTIONS, LowRankUpdates, add_update
from melinoe.finetune.parts.peft_layout import (
    PREFIX,
    factor_keys,
    from_peft_A,
    from_peft_B,
    to_peft_A,
    to_peft_B,
)
from melinoe.moe.experts import ExpertsLayer, find_experts
from melinoe.moe.routing import Router, find_routers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What else PEFT can put into such a file, and the values by which it says that it did not.
_NOT_OURS = ("use_dora", "lora_bias", "bias", "target_modules", "rank_pattern", "alpha_pattern")
_ABSENT: tuple[Any, ...] = (None, False, "none", "dummy-target-modules", [], {})


@dataclass(frozen=True)
class Adapter:
    """
    What was trained, on the CPU.

    Attributes:
        rank: Of each update.
        alpha: As PEFT's ``lora_alpha``.
        scaling: Updates are ``scaling x B A``.
        factors: Experts module -> projection -> ``(A, B)``, ``(E, r, in)`` and ``(E, out, r)``.
        routers: Router module -> its whole state, buffers included.
    """

    rank: int
    alpha: float
    scaling: float
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
    routers: dict[str, dict[str, Tensor]]

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """
        Make the adapter part of *model*'s own weights, in place, each rounded once.

        Raises:
            CheckpointError: layers that share a weight have different updates.
        """
        self._put_routers(model)
        done: dict[int, tuple[Tensor, Tensor]] = {}
        for name, projections in self.factors.items():
            experts = model.get_submodule(name)
            transposed = bool(getattr(experts, "is_transposed", False))
            for projection, (down, up) in projections.items():
                weight = experts.get_parameter(projection)
                if (other := done.get(id(weight))) is not None:
                    _check_shared(name, other, (down, up))
                    continue
                done[id(weight)] = (down, up)
                for expert in range(weight.shape[0]):
                    add_update(weight[expert], down[expert], up[expert], self.scaling, transposed)

    @torch.no_grad()
    def attach(self, model: nn.Module) -> LowRankUpdates:
        """
        Put the updates beside *model*'s weights, to train on from them; routers are replaced.

        A projection that the adapter does not update gets an update of zero.
        """
        layers = find_experts(model)
        self._put_routers(model)
        alpha = self.scaling * self.rank
        updates = LowRankUpdates(model, layers, rank=self.rank, alpha=alpha, seed=0)
        for layer in layers:
            own = updates.of(layer)
            for projection, (down, up) in self.factors.get(layer.name, {}).items():
                own.lora_A[projection].copy_(down)
                own.lora_B[projection].copy_(up)
        return updates

    def _put_routers(self, model: nn.Module) -> None:
        for name, state in self.routers.items():
            model.get_submodule(name).load_state_dict(state)


def adapter_of(parts: TrainedParts) -> Adapter:
    """
    A copy of what is being trained, gathered from all processes where it is sharded.

    Collective under FSDP2: every process must call it, and gets all of it.
    """
    factors, updates = {}, parts.updates
    if updates is not None:
        for layer in updates.layers:
            own = updates.of(layer)
            factors[layer.name] = {
                name: (_copy(own.lora_A[name]), _copy(own.lora_B[name])) for name in own.names
            }
    routers = {
        router.name: {key: _copy(value) for key, value in router.module.state_dict().items()}
        for router in parts.routers
    }
    rank, alpha = (updates.rank, updates.alpha) if updates is not None else (1, 1.0)
    return Adapter(rank, alpha, alpha / rank, factors, routers)


def write_adapter(
    adapter: Adapter, directory: str | Path, base: str, *, generates: bool = True
) -> None:
    """
    Write an adapter's two files into an existing directory.

    Args:
        adapter: What to write.
        directory: Of which PEFT will be given the name.
        base: Name of the model it was trained on, for PEFT's config.
        generates: Whether that model writes text, as PEFT's class for such models requires.
    """
    # Slow to import; its own config class knows what its next version wants to read.
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    tensors, targets = {}, []
    for name, projections in adapter.factors.items():
        for projection, key_A, key_B in factor_keys(name, list(projections)):
            down, up = projections[projection]
            tensors[key_A], tensors[key_B] = to_peft_A(down), to_peft_B(up)
            targets.append(f"{name}.{projection}")
    for name, state in adapter.routers.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        # PEFT refuses an adapter that changes no layer, unless it is told so by this word.
        target_modules=[] if targets else DUMMY_TARGET_MODULES,
        target_parameters=targets,
        modules_to_save=list(adapter.routers),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM" if generates else None,
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """
    What ``adapter_config.json`` says, if the directory holds an adapter that can be read here.

    Raises:
        CheckpointError: no adapter; one that is no LoRA, or that changes more than experts and
            routers.
    """
    path = Path(directory).expanduser()
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"{path} holds no adapter ({CONFIG} and {WEIGHTS}); give a directory that "
            "`melinoe finetune --save adapter` or PEFT wrote"
        )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise CheckpointError(
            f"{path / CONFIG} is not readable ({error}); write the adapter again"
        ) from None
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is an adapter of kind {config.get('peft_type')}, not LORA; "
            "merge it with PEFT (merge_and_unload)"
        )
    odd = [key for key in _NOT_OURS if config.get(key) not in _ABSENT]
    if odd:
        raise CheckpointError(
            f"{path} changes more than expert projections and routers, or not all alike "
            f"({', '.join(odd)}); merge it with PEFT (merge_and_unload)"
        )
    return config


def read_adapter(directory: str | Path, model: nn.Module) -> Adapter:
    """
    Read an adapter, ours or PEFT's, for the base *model* that it was trained on.

    Args:
        directory: With PEFT's two files.
        model: Gives the names and shapes; not changed.

    Raises:
        CheckpointError: as `read_adapter_config`; torn files; names or shapes that are not those
            of *model*.
        UnsupportedModelError: *model* has no experts or no trainable routers.
    """
    path, config = Path(directory).expanduser(), read_adapter_config(directory)
    try:
        tensors = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path / WEIGHTS} is not readable ({error}); write the adapter again"
        ) from None
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    factors = {}
    for layer in find_experts(model):
        projections = _targeted(layer, config.get("target_parameters") or ())
        if projections:
            factors[layer.name] = dict(_take_factors(path, layer, projections, rank, tensors))
    routers = {
        router.name: state
        for router in find_routers(model)
        if (state := _take_router(path, router, tensors))
    }
    if tensors:
        raise CheckpointError(
            f"{path} also changes {next(iter(tensors)).removeprefix(PREFIX)}, which is no expert "
            "projection or router of this base model; give its own base with --base, or merge it "
            "with PEFT (merge_and_unload)"
        )
    return Adapter(rank, alpha, scaling, factors, routers)


def _targeted(layer: ExpertsLayer, targets: Sequence[str]) -> list[str]:
    """The layer's projections that the adapter updates, by PEFT's rule for names."""
    return [
        tensor.name
        for tensor in layer.tensors
        if tensor.name in PROJECTIONS
        and any(f".{layer.name}.{tensor.name}".endswith(f".{target}") for target in targets)
    ]


def _take_factors(
    path: Path, layer: ExpertsLayer, projections: list[str], rank: int, tensors: dict[str, Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    shapes = {tensor.name: tensor.shape for tensor in layer.tensors}
    transposed, experts = bool(getattr(layer.module, "is_transposed", False)), layer.num_experts
    for projection, key_A, key_B in factor_keys(layer.name, projections):
        into, out = shapes[projection] if transposed else shapes[projection][::-1]
        down = _take(path, key_A, (experts * rank, into), tensors)
        up = _take(path, key_B, (out, rank * experts), tensors)
        yield projection, (from_peft_A(down, experts), from_peft_B(up, experts))


def _take_router(path: Path, router: Router, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A router's state, or nothing where the adapter leaves it alone."""
    own = router.module.state_dict()
    stem = f"{PREFIX}{router.name}."
    if not any(key.startswith(stem) for key in tensors):
        return {}
    return {key: _take(path, stem + key, tuple(own[key].shape), tensors) for key in own}


def _take(path: Path, key: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Tensor:
    found = tensors.pop(key, None)
    if found is None or tuple(found.shape) != shape:
        what = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise CheckpointError(
            f"{path} does not fit this base model: it holds {what} for "
            f"{key.removeprefix(PREFIX)}, where {shape} is due; give its own base with --base"
        )
    return found


def _check_shared(name: str, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    if not all(map(torch.equal, one, other)):
        raise CheckpointError(
            f"the experts of {name} share their weights with another layer, but the adapter "
            "updates both differently, so it cannot be merged; train with updates that are shared"
        )


def _copy(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", copy=True)
