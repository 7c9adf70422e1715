"""
Find the mixture-of-experts layers of a transformers model; refuse what cannot be served.

transformers decorates the experts class of a family with ``use_experts_implementation``; such a
module stacks its experts' weights, ``(num_experts, ...)``, and lets a registered function compute
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.experts.format import PLAIN, ExpertFormat, Part

# The child of an experts module that holds low-rank updates while a model is fine-tuned.
ADAPTER = "low_rank"

# Names by which configurations of transformers' families say how many experts a layer has.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                  "num_routed_experts")  # fmt: skip
# And how many of them a token gets.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k",
         "moe_topk", "moe_k", "top_k_experts")  # fmt: skip
# Most families name whole model classes "...Moe...", also when they are configured dense.
_EXPERT_CLASS = re.compile(r"[Ee]xpert|(MoE|Moe|MoeBlock|MoEBlock|SparseMLP)$")
# Types that mean what they say; others need scales that stand elsewhere.
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class ExpertsLayer:
    """One MoE layer: the module that holds its experts, and what one expert consists of."""

    index: int  # counts MoE layers in ``named_modules()`` order
    name: str  # of the module within its model
    module: nn.Module = field(repr=False)  # stacks the experts' weights
    num_experts: int
    tensors: tuple[Part, ...]  # the module's, seen per expert
    format: ExpertFormat = PLAIN  # how an expert is stored outside its module

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts of one expert's block; the module's own tensors where the format is plain."""
        return self.format.parts(self.tensors)

    @property
    def block_bytes(self) -> int:
        """Bytes of one expert's block, without padding."""
        return sum(part.nbytes for part in self.parts)

    @property
    def pair_dtype(self) -> torch.dtype:
        """The type of an expert's output before it is weighted: float32 from packed slots."""
        if not self.format.exact:
            return torch.float32
        return next(tensor.dtype for tensor in self.tensors if tensor.name == "down_proj")

    def stored_as(self, stored: ExpertFormat) -> ExpertsLayer:
        """Give the same layer with its experts stored in another format."""
        return replace(self, format=stored)


def is_experts_module(module: nn.Module) -> bool:
    """Tell whether transformers decorated the class of *module* to take an experts function."""
    # ``_apply_gate`` alone is not enough: an undecorated class may bring its own. The flag is set
    # on the instance by the decorator, together with the attributes that describe the layout.
    return hasattr(module, "_apply_gate") and "is_transposed" in vars(module)


def find_experts(model: nn.Module) -> list[ExpertsLayer]:
    """
    List the MoE layers of *model*, in ``named_modules()`` order; also on the meta device.

    UnsupportedModelError: no MoE layers; a family whose experts transformers does not hand to an
    experts function; a quantised or expert-parallel layout. AttachError: the experts' weights have
    been taken out already, or an adapter sits on them.
    """
    found = [(name, module) for name, module in model.named_modules() if is_experts_module(module)]
    if not found:
        raise UnsupportedModelError(_why_no_layers(model))
    _refuse_adapters(model)
    layers = [_describe(model, index, *pair) for index, pair in enumerate(found)]
    _check_choice(model, min(layer.num_experts for layer in layers))
    return layers


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model that a PEFT model wraps, adapters in place: calls of either reach its forward."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def watch_for_adapters(model: nn.Module, layers: Sequence[ExpertsLayer]) -> Callable[[], None]:
    """Make a check: raises AttachError once an adapter has been put on the experts of *layers*."""
    names = [(layer.name, *layer.name.rpartition(".")[::2]) for layer in layers]
    places = [(model.get_submodule(block), child, name) for name, block, child in names]

    def check() -> None:
        for block, child, name in places:
            if hasattr(block._modules.get(child), "base_layer"):
                raise AttachError(
                    f"an adapter was put on the experts of {name}, whose weights are in the expert "
                    "store; detach() the runtime and merge the adapter into the weights first "
                    "(merge_and_unload, or `melinoe merge`)"
                )

    return check


def family(model: nn.Module) -> str:
    """The model type as transformers names it, for messages."""
    return getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__


def _describe(model: nn.Module, index: int, name: str, module: nn.Module) -> ExpertsLayer:
    """Read one experts module's layout, or say why it cannot be served."""
    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedModelError(
            f"the experts of {name} are split over devices (expert parallelism); "
            "load the model on one device without it"
        )
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    if num_experts < 1:
        raise UnsupportedModelError(
            f"the config gives {name} {num_experts} experts; correct it to what the model was "
            "trained with"
        )
    own = list(module.named_parameters(recurse=False))
    odd = sorted({str(p.dtype) for _, p in own if p.dtype not in PLAIN_DTYPES})
    if odd or any("scale" in key for key, _ in own):
        raise UnsupportedModelError(
            f"the experts of {family(model)} are quantised ({', '.join(odd) or 'with scales'}); "
            "load it unpacked (transformers' quantisation configs take dequantize=True)"
        )
    if own and all(p.dim() > 0 and p.shape[0] == 0 for _, p in own):
        raise AttachError(
            f"the experts of {name} hold no weights because a runtime is attached to this model; "
            "detach() it first"
        )
    transposed = bool(getattr(module, "is_transposed", False))
    tensors = tuple(
        Part(key, tuple(p.shape[1:]), p.dtype, transposed and p.dim() == 3)
        for key, p in own
        if p.dim() > 0 and p.shape[0] == num_experts
    )
    names = {tensor.name for tensor in tensors}
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if not {up, "down_proj"} <= names:
        raise UnsupportedModelError(
            f"the experts of {family(model)} do not stack {up} and down_proj over {num_experts} "
            f"experts (found {', '.join(sorted(names)) or 'nothing'}), so they cannot be cached; "
            "use a family in transformers' standard layout"
        )
    return ExpertsLayer(index, name, module, num_experts, tensors)


def _check_choice(model: nn.Module, num_experts: int) -> None:
    """Refuse a configuration whose routers could not choose as many experts as it says."""
    for config in _configs(getattr(model, "config", None)):
        for key in TOP_K:
            value = getattr(config, key, None)
            counts = value if isinstance(value, list) else [value]
            for count in counts:
                if isinstance(count, int) and not 1 <= count <= num_experts:
                    raise UnsupportedModelError(
                        f"the config gives each token {count} experts ({key}) of a layer that has "
                        f"{num_experts}; correct it to what the model was trained with"
                    )
            groups, kept = getattr(config, "n_group", None), getattr(config, "topk_group", None)
            if not (isinstance(groups, int) and groups > 1 and isinstance(kept, int)):
                continue
            reached = kept * (num_experts // groups)
            fits = num_experts % groups == 0 and 1 <= kept <= groups
            if not fits or any(isinstance(one, int) and one > reached for one in counts):
                raise UnsupportedModelError(
                    f"the config lets each token choose from {kept} of {groups} groups of experts "
                    f"(topk_group, n_group), which does not fit {key} {value} of {num_experts} "
                    "experts; correct it to what the model was trained with"
                )


def _refuse_adapters(model: nn.Module) -> None:
    """An adapter on the stacked weights would be computed on weights that are gone."""
    for name, module in model.named_modules():
        wraps = type(module).__name__ == "ParamWrapper" and any(
            is_experts_module(child) for child in module.modules()
        )
        if wraps or (is_experts_module(module) and hasattr(module, "parametrizations")):
            raise AttachError(
                f"an adapter sits on the experts of {name}; merge it into the weights first "
                "(merge_and_unload, or `melinoe merge`)"
            )
        if is_experts_module(module) and hasattr(module, ADAPTER):
            raise AttachError(
                f"the experts of {name} carry the updates of a fine-tuning that has not ended; "
                "merge them into the weights or take them off first"
            )


def _configs(config: object) -> Iterator[object]:
    """The configuration and all that are nested in it."""
    if config is not None:
        yield config
        for key in getattr(config, "sub_configs", None) or ():
            yield from _configs(getattr(config, key, None))


def _why_no_layers(model: nn.Module) -> str:
    """Tell a dense model from a family whose experts are out of reach."""
    name, config = family(model), getattr(model, "config", None)
    counts = [getattr(one, key, None) for one in _configs(config) for key in EXPERT_COUNTS]
    counted = any(isinstance(count, int) and count > 1 for count in counts)
    classes = {type(m).__name__ for m in model.modules()}
    classes = {one for one in classes if _EXPERT_CLASS.search(one)}
    if not classes and not counted:
        return f"{name} has no mixture-of-experts layers; there is nothing to offload"
    if getattr(config, "quantization_config", None) is not None:
        return (
            f"the experts of {name} are quantised in a layout that has no experts function; load "
            "it with unpacked weights (transformers' quantisation configs take dequantize=True)"
        )
    if not classes:
        return (
            f"{name} is configured without mixture-of-experts layers; there is nothing to offload"
        )
    return (
        f"{name} has experts ({', '.join(sorted(classes))}), but transformers does not let a "
        "registered function compute them, so this family cannot be served; use one of the "
        "decorated families"
    )
