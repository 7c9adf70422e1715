"""
Adapters: what fine-tuning trained, without its model, in memory and in PEFT's files.

``adapter_model.safetensors`` holds the factors of all updates and, whole and in float32, the
routers; ``adapter_config.json`` names the updated stacks of experts (``target_parameters``), the
updated linear modules (``target_modules``) and the routers (``modules_to_save``).

For a stack of *E* experts PEFT keeps two plain linear layers: ``lora_A`` of weight ``(E r, in)``,
experts outermost, and ``lora_B`` of weight ``(out, r E)``, experts **innermost**. PEFT wraps a
module once per updated parameter, the first one innermost, so the last has its factors on the
outermost wrapper and each before it one ``base_layer`` deeper (``ParamWrapper`` of PEFT 0.21).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copymode
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from melinoe.checkpoint.sources import ExpertSource
from melinoe.errors import CheckpointError
from melinoe.finetune.parts import PROJECTIONS, Factors, TrainedParts, add_update, is_transposed
from melinoe.moe.experts import ExpertsLayer, find_experts
from melinoe.moe.routing import find_routers
from melinoe.schema import Schema, fields, problem
from melinoe.whole_file import parse_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIRECTORY = "adapter"
"""Name of the adapter's directory in a checkpoint that was saved with it."""

_PREFIX = "base_model.model."
# What else PEFT can put into such a file, and the values by which it says that it did not.
_NOT_OURS = (
    "use_dora", "lora_bias", "bias", "fan_in_fan_out", "layer_replication", "use_qalora",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Ways to begin that take a part out of the base's own weights (``init_lora_weights``).
_OF_ANOTHER_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_ABSENT: tuple[Any, ...] = (None, False, "none", [], {})
# What of PEFT's config is read here.
_FIELDS: Schema = {
    **{"r": "count", "lora_alpha": "number", "base_model_name_or_path?": "text"},
    **{"rank_pattern?": {"*": "count"}, "alpha_pattern?": {"*": "number"}},
    **fields(["text"], "target_parameters?", "modules_to_save?"),
}
# What PEFT puts behind the name of a module, and the experts of transformers before its fifth.
_OF_PEFT = re.compile(r"\.(?:base_layer|lora_|modules_to_save|original_module)")
_OF_ONE_EXPERT = re.compile(r"experts\.\d+\.")


@dataclass(frozen=True)
class Adapter:
    """
    Trained routers and low-rank updates, on the CPU. *alpha* is PEFT's ``lora_alpha``; updates are
    ``scaling x B A``. *factors*: module name to the factors of its parameters, of a linear module
    ``weight``; *routers*: router module to its whole state, buffers included.
    """

    rank: int
    alpha: float
    scaling: float
    factors: dict[str, Factors]
    routers: dict[str, dict[str, Tensor]]

    def names(self) -> list[str]:
        """Full names of all tensors of the model that `apply` may change."""
        both: tuple[Mapping[str, Mapping[str, Any]], ...] = (self.routers, self.factors)
        return [f"{name}.{key}" for of in both for name, own in of.items() for key in own]

    @torch.no_grad()
    def expert(self, source: ExpertSource, projection: str, expert: int) -> Tensor:
        """Read one expert's matrix of the base, and add its update; rounded once."""
        tensor = next(one for one in source.layer.tensors if one.name == projection)
        weight = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        source.readers[projection].read(expert, weight)
        if (update := self.factors.get(source.layer.name, {}).get(projection)) is not None:
            down, up = update
            add_update(weight, down[expert], up[expert], self.scaling, tensor.transposed)
        return weight

    @torch.no_grad()
    def apply(self, model: nn.Module, experts: bool = True) -> None:
        """
        Make the adapter part of *model*'s own weights, in place, each rounded once. Without
        *experts* those of its experts are left out: `expert` gives them one by one.
        CheckpointError: layers that share a weight have different updates.
        """
        for name, state in self.routers.items():
            model.get_submodule(name).load_state_dict(state)
        done: dict[int, tuple[Tensor, Tensor]] = {}
        for name, own in self.factors.items():
            module = model.get_submodule(name)
            for key, update in own.items():
                weight = module.get_parameter(key)
                if (other := done.setdefault(id(weight), update)) is update:
                    if weight.dim() > 2 and not experts:
                        continue
                    add_update(weight, *update, self.scaling, is_transposed(module))
                elif not all(map(torch.equal, other, update)):
                    raise CheckpointError(
                        f"the weights of {name} are shared with another layer, but the adapter "
                        "updates both differently, so it cannot be merged; train with updates that "
                        "are shared"
                    )


def adapter_of(parts: TrainedParts) -> Adapter:
    """Copy what is being trained, gathered where it is sharded: every process must call."""
    updates, factors = parts.updates, dict[str, Factors]()
    for site in () if updates is None else updates.sites:
        one = updates.of(site)  # type: ignore[union-attr]
        pairs = zip(one.names, one.lora_A.values(), one.lora_B.values(), strict=True)
        factors[site] = {name: (_copy(down), _copy(up)) for name, down, up in pairs}
    routers = {
        router.name: {key: _copy(value) for key, value in router.module.state_dict().items()}
        for router in parts.routers
    }
    rank, alpha = (1, 1.0) if updates is None else (updates.rank, updates.alpha)
    return Adapter(rank, alpha, alpha / rank, factors, routers)


def write_adapter(
    adapter: Adapter, directory: str | Path, base: str, *, generates: bool = True
) -> None:
    """Write an adapter's two files; *base* is an absolute path, or a name on the hub."""
    # Slow to import; its own config class knows what its next version wants to read.
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for name, own in adapter.factors.items():
        for key, key_A, key_B in factor_keys(name, list(own)):
            down, up = own[key]
            if down.dim() == 2:
                modules.append(name)
            else:
                parameters.append(f"{name}.{key}")
                down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
            tensors |= {key_A: down.contiguous(), key_B: up.contiguous()}
    for name, state in adapter.routers.items():
        tensors |= {f"{_PREFIX}{name}.{key}": value for key, value in state.items()}
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        # PEFT refuses an adapter that changes no layer, unless it is told so by this word.
        target_modules=modules if adapter.factors else DUMMY_TARGET_MODULES,
        target_parameters=parameters,
        modules_to_save=list(adapter.routers),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM" if generates else None,
        inference_mode=True,
    )
    config.save_pretrained(str(directory))
    save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})
    copymode(Path(directory) / CONFIG, Path(directory) / WEIGHTS)  # safetensors' are private


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """Read ``adapter_config.json``; CheckpointError: no LoRA, or one that changes more."""
    path = Path(directory).expanduser()
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"{path} holds no adapter ({CONFIG} and {WEIGHTS}); give a directory that "
            "`melinoe finetune --save adapter` or PEFT wrote"
        )
    try:
        config = parse_json((path / CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        if config.get("peft_type") == "LORA":
            if wrong := problem(config, _FIELDS):
                raise ValueError(wrong)
            ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
            if not all((config["r"], *ranks.values())):
                raise ValueError("a rank of 0")
            for pattern in (*ranks, *alphas):
                re.compile(pattern)
    except (ValueError, re.error) as error:
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
    if str(start := config.get("init_lora_weights")).lower().startswith(_OF_ANOTHER_BASE):
        raise CheckpointError(
            f"{path} began with {start}, which changed the base's weights too; save it again with "
            "PEFT's path_initial_model_for_weight_conversion, or merge it there (merge_and_unload)"
        )
    return config


def read_adapter(
    directory: str | Path, model: nn.Module, layers: Sequence[ExpertsLayer] | None = None
) -> Adapter:
    """
    Read an adapter, ours or PEFT's, for the base *model*, which gives names and shapes. *layers*
    are its MoE layers, where it has none of their weights. CheckpointError: as
    `read_adapter_config`; torn files; names or shapes that are not those of *model*.
    """
    path, config = Path(directory).expanduser(), read_adapter_config(directory)
    try:
        # Copied: what is returned is the file, mapped, and would change with it in a long run.
        tensors = {name: one.clone() for name, one in load_file(path / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path / WEIGHTS} is not readable ({error}); write the adapter again"
        ) from None

    def take(key: str, *shape: int) -> Tensor:
        found = tensors.pop(key, None)
        if found is None or tuple(found.shape) != shape:
            what = "nothing" if found is None else f"shape {tuple(found.shape)}"
            raise CheckpointError(
                f"{path} does not fit this base model: it holds {what} for "
                f"{key.removeprefix(_PREFIX)}, where {shape} is due; give its own base with --base"
            )
        return found

    rank, common = _rank_and_scaling(config)

    def scaled(up: Tensor, scaling: float) -> Tensor:  # so that the factor of all is right for it
        return up if scaling == common else up.float() * (scaling / common)

    factors: dict[str, Factors] = {}
    for layer in find_experts(model) if layers is None else layers:
        shapes = {
            one.name: one.shape
            for one in layer.tensors
            if one.name in PROJECTIONS and _is_target(f"{layer.name}.{one.name}", config)
        }
        own = {}
        for name, key_A, key_B in factor_keys(layer.name, list(shapes)):
            into, out = shapes[name] if is_transposed(layer.module) else shapes[name][::-1]
            its_rank, scaling = _rank_and_scaling(config, f"{layer.name}.{name}")
            pairs = layer.num_experts * its_rank
            down, up = take(key_A, pairs, into), scaled(take(key_B, out, pairs), scaling)
            own[name] = (from_peft_A(down, layer.num_experts), from_peft_B(up, layer.num_experts))
        factors |= {layer.name: own} if own else {}
    found, routers = find_routers(model), {}
    for router in found:
        state, stem = router.module.state_dict(), f"{_PREFIX}{router.name}."
        if any(stem + key in tensors for key in state):
            routers[router.name] = {key: take(stem + key, *one.shape) for key, one in state.items()}
    # PEFT lays updates of single matrices out alike: of linear modules, routers (before
    # transformers 5 a linear module, and named as such), parameters that are named.
    of_routers = {f"{one.name}.{one.source}".rstrip(".") for one in found}
    for name, module in model.named_modules():
        ((_, key_A, key_B),) = factor_keys(name, ["weight"])
        weight = getattr(module, "weight", None)
        if not (key_A in tensors or key_B in tensors) or getattr(weight, "ndim", 0) != 2:
            continue
        named = _is_target(f"{name}.weight", config)
        if isinstance(module, nn.Linear) or name in of_routers or named:
            out, into = weight.shape  # type: ignore[union-attr]
            its_rank, scaling = _rank_and_scaling(config, name, f"{name}.weight")
            down, up = take(key_A, its_rank, into), take(key_B, out, its_rank)
            factors[name] = {"weight": (down, scaled(up, scaling))}
    if tensors:
        raise CheckpointError(_why_not(path, next(iter(tensors)).removeprefix(_PREFIX), model))
    return Adapter(rank, float(config["lora_alpha"]), common, factors, routers)


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


def _is_target(parameter: str, config: dict[str, Any]) -> bool:
    """Whether an adapter names *parameter*, by PEFT's rule for names."""
    targets: Sequence[str] = config.get("target_parameters") or ()
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def _why_not(path: Path, name: str, model: nn.Module) -> str:
    """Why a tensor of an adapter cannot be merged: its kind, or another base."""
    if _OF_ONE_EXPERT.search(name):
        return (
            f"{path} changes {name}: it was made where each expert was a module of its own, as in "
            "transformers 4; merge it there with PEFT (merge_and_unload)"
        )
    module = _OF_PEFT.split(name)[0]
    known = {key for of in ("parameters", "buffers", "modules")
             for key, _ in getattr(model, f"named_{of}")()}  # fmt: skip
    if module in known:
        return (
            f"{path} also changes {module}, which is no projection or router; merge it with PEFT "
            "(merge_and_unload), which gives a plain checkpoint too"
        )
    return (
        f"{path} changes {name}, and the base model has nothing of that name; give its own base "
        "with --base"
    )


def from_peft_A(weight: Tensor, num_experts: int) -> Tensor:
    """Turn PEFT's ``(E r, in)`` into ``(E, r, in)``."""
    return weight.unflatten(0, (num_experts, -1)).contiguous()


def from_peft_B(weight: Tensor, num_experts: int) -> Tensor:
    """Turn PEFT's ``(out, r E)`` into ``(E, out, r)``."""
    return weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1).contiguous()


def factor_keys(module: str, parameters: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name each parameter's factors in an adapter's file: parameter, key of A, key of B."""
    for place, parameter in enumerate(parameters):
        depth = ".base_layer" * (len(parameters) - 1 - place)
        stem = f"{_PREFIX}{module}{depth}"
        yield parameter, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _copy(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to("cpu", copy=True)
