"""
Adapters: what fine-tuning trained, without its model, in memory and in PEFT's files.

``adapter_model.safetensors`` holds the factors of all updates and, whole, the routers;
``adapter_config.json`` names the updated stacks of experts (``target_parameters``), the updated
linear modules (``target_modules``) and the routers (``modules_to_save``), each by its full name.
``PeftModel.from_pretrained`` takes the directory as it is. Routers are kept in float32: what a
checkpoint in bfloat16 must round is exact here.

For a stack of *E* experts PEFT keeps two plain linear layers: ``lora_A`` of weight ``(E r, in)``,
experts outermost, and ``lora_B`` of weight ``(out, r E)``, experts **innermost**. Ours are
``(E, r, in)`` and ``(E, out, r)``. PEFT wraps a module once per updated parameter, the first one
innermost, so the last has its factors on the outermost wrapper and each before it one
``base_layer`` deeper (``peft.tuners.lora.layer.ParamWrapper`` of PEFT 0.21).
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copymode
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from melinoe.errors import CheckpointError
from melinoe.finetune.parts import PROJECTIONS, TrainedParts, add_update, is_transposed
from melinoe.moe.experts import ExpertsLayer, find_experts
from melinoe.moe.routing import Router, find_routers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# What else PEFT can put into such a file, and the values by which it says that it did not.
_NOT_OURS = ("use_dora", "lora_bias", "bias", "fan_in_fan_out")
# What PEFT puts behind the name of a module, and the experts of transformers before its fifth.
_OF_PEFT = re.compile(r"\.(?:base_layer|lora_|modules_to_save|original_module)")
_OF_ONE_EXPERT = re.compile(r"experts\.\d+\.")
_ABSENT: tuple[Any, ...] = (None, False, "none", [], {})


@dataclass(frozen=True)
class Adapter:
    """
    Trained routers and low-rank updates, on the CPU.

    Attributes:
        rank: Of each update.
        alpha: As PEFT's ``lora_alpha``.
        scaling: Updates are ``scaling x B A``.
        factors: Experts module -> projection -> ``(A, B)``, ``(E, r, in)`` and ``(E, out, r)``.
        routers: Router module -> its whole state, buffers included.
        linears: Linear module -> ``(A, B)``, ``(r, in)`` and ``(out, r)``.
    """

    rank: int
    alpha: float
    scaling: float
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
    routers: dict[str, dict[str, Tensor]]
    linears: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Full names of all tensors of the model that `apply` may change."""
        return [
            *(f"{name}.{key}" for name, state in self.routers.items() for key in state),
            *(f"{name}.{projection}" for name, own in self.factors.items() for projection in own),
            *(f"{name}.weight" for name in self.linears),
        ]

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """
        Make the adapter part of *model*'s own weights, in place, each rounded once.

        Raises:
            CheckpointError: layers that share a weight have different updates.
        """
        for name, state in self.routers.items():
            model.get_submodule(name).load_state_dict(state)
        done: dict[int, tuple[Tensor, Tensor]] = {}

        def is_new(name: str, weight: Tensor, update: tuple[Tensor, Tensor]) -> bool:
            if (other := done.setdefault(id(weight), update)) is update:
                return True
            if not all(map(torch.equal, other, update)):
                raise CheckpointError(
                    f"the weights of {name} are shared with another layer, but the adapter updates "
                    "both differently, so it cannot be merged; train with updates that are shared"
                )
            return False

        for name, projections in self.factors.items():
            experts = model.get_submodule(name)
            for projection, update in projections.items():
                weight = experts.get_parameter(projection)
                if is_new(name, weight, update):
                    for one, down, up in zip(weight, *update, strict=True):
                        add_update(one, down, up, self.scaling, is_transposed(experts))
        for name, update in self.linears.items():
            weight = model.get_submodule(name).get_parameter("weight")
            if is_new(name, weight, update):
                add_update(weight, *update, self.scaling, False)


def adapter_of(parts: TrainedParts) -> Adapter:
    """
    Copy what is being trained, gathered from all processes where it is sharded.

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
    linears = {}
    if parts.attention is not None:
        for name in parts.attention.projections:
            one = parts.attention.of(name)
            linears[name] = (_copy(one.lora_A), _copy(one.lora_B))
    rank, alpha = (updates.rank, updates.alpha) if updates is not None else (1, 1.0)
    return Adapter(rank, alpha, alpha / rank, factors, routers, linears)


def write_adapter(
    adapter: Adapter, directory: str | Path, base: str, *, generates: bool = True
) -> None:
    """
    Write an adapter's two files into an existing directory.

    Args:
        adapter: What to write.
        directory: Of which PEFT will be given the name.
        base: Name of the model it was trained on, for PEFT's config: absolute, or of the hub.
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
    for name, (down, up) in adapter.linears.items():
        key_A, key_B = linear_keys(name)
        tensors[key_A], tensors[key_B] = down.contiguous(), up.contiguous()
    for name, state in adapter.routers.items():
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
    changes = targets or adapter.linears
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        # PEFT refuses an adapter that changes no layer, unless it is told so by this word.
        target_modules=list(adapter.linears) if changes else DUMMY_TARGET_MODULES,
        target_parameters=targets,
        modules_to_save=list(adapter.routers),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM" if generates else None,
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})
    copymode(Path(directory) / CONFIG, Path(directory) / WEIGHTS)  # safetensors' are private


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """
    Read ``adapter_config.json``, if the directory holds an adapter that can be read here.

    Raises:
        CheckpointError: no adapter; one that is no LoRA, or that changes more than projections and
            routers.
    """
    path = Path(directory).expanduser()
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"{path} holds no adapter ({CONFIG} and {WEIGHTS}); give a directory that "
            "`melinoe finetune --save adapter` or PEFT wrote"
        )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8-sig"))
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
            f"{path} changes more than projections and routers ({', '.join(odd)}); merge it with "
            "PEFT (merge_and_unload)"
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
        # Copied: what is returned is the file, mapped, and would change with it in a long run.
        tensors = {name: one.clone() for name, one in load_file(path / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path / WEIGHTS} is not readable ({error}); write the adapter again"
        ) from None
    rank, scaling = _rank_and_scaling(config)
    factors = {}
    for layer in find_experts(model):
        projections = _targeted(layer, config)
        if projections:
            factors[layer.name] = dict(_take_factors(path, layer, projections, config, tensors))
    routers = {
        router.name: state
        for router in find_routers(model)
        if (state := _take_router(path, router, tensors))
    }
    linears = dict(_take_linears(path, model, config, tensors))
    if tensors:
        raise CheckpointError(_why_not(path, next(iter(tensors)).removeprefix(PREFIX), model))
    return Adapter(rank, float(config["lora_alpha"]), scaling, factors, routers, linears)


def _rank_and_scaling(config: dict[str, Any], *names: str) -> tuple[int, float]:
    """Rank and factor of the update of one module or parameter, by PEFT's rule for patterns."""

    def found(kind: str, default: Any) -> Any:
        for pattern, value in (config.get(kind) or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return value
        return default

    rank = int(found("rank_pattern", config["r"]))
    alpha = float(found("alpha_pattern", config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _targeted(layer: ExpertsLayer, config: dict[str, Any]) -> list[str]:
    """List the layer's projections that the adapter updates."""
    return [
        tensor.name
        for tensor in layer.tensors
        if tensor.name in PROJECTIONS and _is_target(f"{layer.name}.{tensor.name}", config)
    ]


def _is_target(parameter: str, config: dict[str, Any]) -> bool:
    """Whether an adapter names *parameter*, by PEFT's rule for names."""
    targets: Sequence[str] = config.get("target_parameters") or ()
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def _take_factors(
    path: Path,
    layer: ExpertsLayer,
    projections: list[str],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    shapes = {tensor.name: tensor.shape for tensor in layer.tensors}
    transposed, experts = is_transposed(layer.module), layer.num_experts
    for projection, key_A, key_B in factor_keys(layer.name, projections):
        into, out = shapes[projection] if transposed else shapes[projection][::-1]
        rank, scaling = _rank_and_scaling(config, f"{layer.name}.{projection}")
        down = _take(path, key_A, (experts * rank, into), tensors)
        up = _take(path, key_B, (out, rank * experts), tensors)
        up = _scaled(up, scaling, config)
        yield projection, (from_peft_A(down, experts), from_peft_B(up, experts))


def _scaled(up: Tensor, scaling: float, config: dict[str, Any]) -> Tensor:
    """B of an update, so that the factor of all updates is right for it."""
    _, common = _rank_and_scaling(config)
    return up if scaling == common else up.float() * (scaling / common)


def _take_linears(
    path: Path, model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """
    Updates of single matrices: linear modules, routers, named parameters; their keys name them.

    PEFT lays all of them out alike. What is a router's weight here was a linear module before
    transformers 5, and may be named as such.
    """
    routers = {f"{one.name}.{one.source}".rstrip(".") for one in find_routers(model)}
    for name, module in model.named_modules():
        key_A, key_B = linear_keys(name)
        weight = getattr(module, "weight", None)
        if not (key_A in tensors or key_B in tensors) or getattr(weight, "ndim", 0) != 2:
            continue
        named = _is_target(f"{name}.weight", config)
        if isinstance(module, nn.Linear) or name in routers or named:
            out, into = weight.shape  # type: ignore[union-attr]
            rank, scaling = _rank_and_scaling(config, name, f"{name}.weight")
            down = _take(path, key_A, (rank, into), tensors)
            yield name, (down, _scaled(_take(path, key_B, (out, rank), tensors), scaling, config))


def _take_router(path: Path, router: Router, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take a router's state; nothing where the adapter does not hold it whole."""
    own = router.module.state_dict()
    stem = f"{PREFIX}{router.name}."
    if not any(stem + key in tensors for key in own):
        return {}
    return {key: _take(path, stem + key, tuple(own[key].shape), tensors) for key in own}


def _why_not(path: Path, name: str, model: nn.Module) -> str:
    """Why a tensor of an adapter cannot be merged: its kind, or another base."""
    if _OF_ONE_EXPERT.search(name):
        return (
            f"{path} changes {name}: it was made where each expert was a module of its own, as in "
            "transformers 4; merge it there with PEFT (merge_and_unload)"
        )
    module = _OF_PEFT.split(name)[0]
    if module in model.state_dict() or module in dict(model.named_modules()):
        return (
            f"{path} also changes {module}, which is no projection or router; merge it with PEFT "
            "(merge_and_unload), which gives a plain checkpoint too"
        )
    return (
        f"{path} changes {name}, and the base model has nothing of that name; give its own base "
        "with --base"
    )


def _take(path: Path, key: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> Tensor:
    found = tensors.pop(key, None)
    if found is None or tuple(found.shape) != shape:
        what = "nothing" if found is None else f"shape {tuple(found.shape)}"
        raise CheckpointError(
            f"{path} does not fit this base model: it holds {what} for "
            f"{key.removeprefix(PREFIX)}, where {shape} is due; give its own base with --base"
        )
    return found


def to_peft_A(lora_A: Tensor) -> Tensor:
    """Turn ``(E, r, in)`` into PEFT's ``(E r, in)``."""
    return lora_A.flatten(0, 1).contiguous()


def to_peft_B(lora_B: Tensor) -> Tensor:
    """Turn ``(E, out, r)`` into PEFT's ``(out, r E)``."""
    return lora_B.permute(1, 2, 0).flatten(1).contiguous()


def from_peft_A(weight: Tensor, num_experts: int) -> Tensor:
    """Turn PEFT's ``(E r, in)`` into ``(E, r, in)``."""
    return weight.unflatten(0, (num_experts, -1)).contiguous()


def from_peft_B(weight: Tensor, num_experts: int) -> Tensor:
    """Turn PEFT's ``(out, r E)`` into ``(E, out, r)``."""
    return weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1).contiguous()


def factor_keys(experts_name: str, projections: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """
    Name each projection's factors in an adapter's file: projection, lora_A's key, lora_B's key.

    Args:
        experts_name: Of the experts module in the base model.
        projections: The updated parameters, in the module's own order.
    """
    for place, projection in enumerate(projections):
        depth = ".base_layer" * (len(projections) - 1 - place)
        stem = f"{PREFIX}{experts_name}{depth}"
        yield projection, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def linear_keys(name: str) -> tuple[str, str]:
    """Name a linear module's lora_A, ``(r, in)``, and lora_B in an adapter's file."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _copy(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", copy=True)
