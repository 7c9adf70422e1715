"""Describe a checkpoint, and what running it takes, without reading a weight."""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from melinoe.checkpoint.files import has_weights, read_config, read_raw_config
from melinoe.checkpoint.opening import (
    as_dtype,
    build_on_meta,
    find_model_class,
    guess_dtype,
    open_checkpoint,
)
from melinoe.checkpoint.packed import expert_format
from melinoe.errors import ModelError, UnsupportedModelError
from melinoe.moe.experts import TOP_K, ExpertsLayer, find_experts
from melinoe.moe.routing import find_routers


@dataclass(frozen=True)
class Description:
    """
    Hold what a checkpoint's config and its files' headers tell.

    Attributes:
        name: The directory or hub name.
        model_type: transformers' name of the family.
        architecture: The class that the config names.
        supported: Whether it can be served as it is.
        reason: Why not; None where it can.
        weights: Whether weight files are there; without them the numbers are the config's.
        dtype: The type the weights are given in memory, like ``bfloat16``.
        format: How experts are stored: ``plain``, or packed, like ``mxfp4``.
        moe_layers: How many layers have experts.
        num_experts: Experts of a layer; the most, where layers differ.
        top_k: Experts a token uses in a layer; None where the config does not say.
        bytes_per_expert: Of one expert in one layer, packed if it is stored so; the most, where
            layers differ.
        expert_bytes: Of all experts of all layers.
        backbone_bytes: Of all else.
        layers: Per MoE layer: experts, and bytes of one.
    """

    name: str
    model_type: str | None
    architecture: str | None
    supported: bool
    reason: str | None
    weights: bool
    dtype: str | None = None
    format: str | None = None
    moe_layers: int = 0
    num_experts: int = 0
    top_k: int | None = None
    bytes_per_expert: int = 0
    expert_bytes: int = 0
    backbone_bytes: int = 0
    layers: tuple[tuple[int, int], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON can hold them."""
        return asdict(self)


def describe(name: str, dtype: torch.dtype | str = "auto") -> Description:
    """
    Describe a checkpoint from its config, and check its files' headers where they are at hand.

    Weights are neither read nor downloaded: for a name on the hub only the config is fetched, and
    headers are checked if the weights are in the local cache.

    Raises:
        CheckpointError: there is no readable config to describe.
        ValueError: *dtype* is no floating-point type.
    """
    name = str(name)
    wanted = None if dtype == "auto" else as_dtype(dtype)
    _, raw = read_raw_config(name)
    named = raw.get("architectures")
    weights = has_weights(name, download=False)
    known: dict[str, Any] = {}
    reason = None
    try:
        config = read_config(name)
        known = _from_config(name, raw, config, wanted or guess_dtype(name, config))
        if weights:
            with open_checkpoint(name, dtype, download=False) as checkpoint:
                stored = [replace(x.layer, format=x.format) for x in checkpoint.experts]
                known = _from_config(name, raw, config, checkpoint.dtype) | _of_layers(stored)
    except ModelError as error:
        reason = str(error)
    return Description(
        name=name,
        model_type=raw.get("model_type"),
        architecture=named[0] if named and isinstance(named, list) else None,
        supported=reason is None,
        reason=reason,
        weights=weights,
        **known,
    )


def _from_config(name: str, raw: dict[str, Any], config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Tell all that the config alone tells, with plain weights of *dtype*."""
    model = build_on_meta(find_model_class(config), copy.deepcopy(config), dtype)
    layers = find_experts(model)
    plain = sum(layer.num_experts * layer.block_bytes for layer in layers)
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    layers = [replace(one, format=expert_format(raw, name, one.name)) for one in layers]
    known = _of_layers(layers) | {"backbone_bytes": everything - plain}
    known["dtype"] = str(dtype).removeprefix("torch.")
    try:
        known["top_k"] = find_routers(model)[0].top_k or top_k_of(config)
    except UnsupportedModelError:  # a router that cannot be trained can still be served
        known["top_k"] = top_k_of(config)
    return known


def _of_layers(layers: list[ExpertsLayer]) -> dict[str, Any]:
    return {
        "format": layers[0].format.name,
        "moe_layers": len(layers),
        "num_experts": max(layer.num_experts for layer in layers),
        "bytes_per_expert": max(layer.block_bytes for layer in layers),
        "expert_bytes": sum(layer.num_experts * layer.block_bytes for layer in layers),
        "layers": tuple((layer.num_experts, layer.block_bytes) for layer in layers),
    }


def top_k_of(config: Any) -> int | None:
    """Find how many experts a token uses in a layer; None if the config does not say."""
    for part in (config, config.get_text_config()):
        for key in (*TOP_K, "top_k"):
            # ``top_k`` alone is a sampling setting in old configs, so it comes last.
            value = getattr(part, key, None)
            if isinstance(value, list) and value:
                value = max(value)
            if isinstance(value, int) and value > 0:
                return value
    return None
