"""Weigh a model by its config alone: no weight is read and none is downloaded."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from melinoe.checkpoint.files import read_object, read_raw_config
from melinoe.checkpoint.opening import build_on_meta, find_model_class, guess_dtype, top_k_of
from melinoe.checkpoint.packed import expert_format, plain_config
from melinoe.errors import CheckpointError, UnsupportedModelError
from melinoe.experts.format import ExpertFormat
from melinoe.moe.experts import ExpertsLayer, find_experts
from melinoe.moe.meta_pass import DIRECT, cache_bytes, forward


@dataclass(frozen=True)
class Layer:
    """One MoE layer: its experts, the bytes of one, and how many a token uses."""

    num_experts: int
    block_bytes: int
    top_k: int


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, as its config tells them."""

    name: str  # as it was asked for
    source: str  # where the config came from, for people
    model_type: str  # transformers' name of the family
    dtype: str  # type of the weights, like ``bfloat16``
    decoder_layers: int  # layers of the decoder, dense ones included
    layers: tuple[Layer, ...]  # the MoE layers
    backbone_bytes: int  # every parameter outside the experts
    # Of those, what one token's arithmetic reads; tables of which a token takes a row, and parts
    # for images or sound, are not in it.
    read_bytes: int
    # Keys, values and states of one sequence of *context* tokens; None if not known.
    kv_bytes: int | None
    kv_source: str  # how that is known, or why not
    context: int  # tokens of a sequence
    max_context: int | None  # what the config says the model was made for; None if it does not
    # How experts are stored, as ``mxfp4, 4.25 bits a weight``; None where they are not packed.
    packed: str | None = None

    @property
    def expert_bytes(self) -> int:
        """All experts of all layers."""
        return sum(layer.num_experts * layer.block_bytes for layer in self.layers)

    @property
    def active_expert_bytes(self) -> int:
        """M: what one token's experts weigh over all layers."""
        return sum(layer.top_k * layer.block_bytes for layer in self.layers)

    @property
    def num_experts(self) -> int:
        """Experts of a layer; the most, where layers differ."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def top_k(self) -> int:
        """Experts a token uses in a layer; the most, where layers differ."""
        return max(layer.top_k for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, totals included; layers that are alike are counted together."""
        out = asdict(self)
        alike: dict[Layer, int] = {}
        for layer in self.layers:
            alike[layer] = alike.get(layer, 0) + 1
        out["layers"] = [{"count": count, **asdict(layer)} for layer, count in alike.items()]
        return out | {
            "moe_layers": len(self.layers),
            "expert_bytes": self.expert_bytes,
            "active_expert_bytes": self.active_expert_bytes,
        }


def model_facts(
    model: str, context: int = 4096, dtype: torch.dtype | None = None, *, packed: bool = True
) -> ModelFacts:
    """
    Count a model's bytes from its config.

    Args:
        model: A directory with a ``config.json``, such a file, a name on the hub (of which only
            the config is fetched), or a name of `known_models`.
        context: Tokens of a sequence, for the cache of keys and values.
        dtype: Of the weights; None: the config's, else that of the weights that are here.
        packed: Count packed experts as they are stored; else as they mean, in *dtype*.

    Raises:
        CheckpointError: no readable config, or weights packed in a form that is not known.
        UnsupportedModelError: a dense model, or a family whose experts cannot be served.
    """
    config, source, wanted, built, experts = built_from_config(model, dtype, packed=packed)
    of_experts = {id(p) for one in experts for p in one.module.parameters(recurse=False)}
    others = [p for p in built.parameters() if id(p) not in of_experts]
    sizes = {id(p): p.numel() * p.element_size() for p in others}
    backbone = sum(sizes[id(p)] for p in others)
    text = config.get_text_config(decoder=True)
    stored = experts[0].format
    try:
        seen = forward(built, experts, min(context, DIRECT), sizes)
        read, top_k = seen.read_bytes, seen.top_k
        kv: int | None = cache_bytes(built, experts, context, seen)
        kv_source = "the model's own cache after a pass without weights"
    except RuntimeError as error:
        read, top_k = _all_but_embedding(built, backbone), (None,) * len(experts)
        kv, kv_source = None, f"not known: no pass runs ({str(error).splitlines()[0][:80]})"
    stored_as = None
    if not stored.exact:
        bits = stored.bits_per_weight(experts[0].tensors)
        stored_as = f"{stored.name}, {bits:.2f} bits a weight"
    return ModelFacts(
        name=model,
        source=source,
        model_type=config.model_type,
        dtype=str(wanted).removeprefix("torch."),
        decoder_layers=int(getattr(text, "num_hidden_layers", len(experts))),
        layers=tuple(
            Layer(one.num_experts, one.block_bytes, min(top_k_in(config, k), one.num_experts))
            for one, k in zip(experts, top_k, strict=True)
        ),
        backbone_bytes=backbone,
        read_bytes=read,
        kv_bytes=kv,
        kv_source=kv_source,
        context=context,
        max_context=getattr(text, "max_position_embeddings", None),
        packed=stored_as,
    )


def built_from_config(
    model: str, dtype: torch.dtype | None = None, *, packed: bool = True
) -> tuple[PreTrainedConfig, str, torch.dtype, Any, list[ExpertsLayer]]:
    """
    Build a model without weights; see `model_facts`.

    Gives its config, where that came from, the type of the weights, the model, and its MoE layers
    in the format in which they are stored.
    """
    config, source, raw = _config(model)
    wanted = dtype or guess_dtype(model, config)
    built = build_on_meta(find_model_class(config), copy.deepcopy(config), wanted)
    built.eval()
    experts = find_experts(built)
    if packed:
        experts = [replace(one, format=_format(raw, model, one)) for one in experts]
    return config, source, wanted, built, experts


def _format(raw: dict[str, Any], name: str, layer: ExpertsLayer) -> ExpertFormat:
    """How the config says that a layer's experts are stored."""
    try:
        return expert_format(raw, name, layer.name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; or give --bits 8 or 4 to plan its weights stored so"
        ) from None


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Label -> name on the hub and config, of the models in the table of limits."""
    text = Path(__file__).with_name("models.json").read_text(encoding="utf-8")
    return {one["label"]: one for one in json.loads(text)["models"]}


def _config(model: str) -> tuple[PreTrainedConfig, str, dict[str, Any]]:
    """The config, where it came from, and as it is written: here, as it ships, then the hub."""
    path = Path(model).expanduser()
    asked = {label.lower(): one for label, one in known_models().items()}
    asked |= {one["name"].lower(): one for one in known_models().values()}
    if path.is_file():
        raw, source = read_object(path), model
    elif not path.is_dir() and (shipped := asked.get(model.lower())):
        raw, source = shipped["config"], f"{shipped['name']}, as shipped with melinoe"
    else:
        raw = read_raw_config(model)[1]
        source = "its directory" if path.is_dir() else "the hub's config.json alone"
    family = raw.get("model_type")
    if not family:
        raise CheckpointError(f"{model} names no model_type; give a transformers model's config")
    try:
        return CONFIG_MAPPING[family].from_dict(plain_config(raw)), source, raw
    except Exception as error:
        raise UnsupportedModelError(
            f"transformers cannot read the config of family {family!r} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "use a family that transformers itself implements"
        ) from None


def top_k_in(config: PreTrainedConfig, seen: int | None = None) -> int:
    """Choices of a token in a layer: what ran, else what the config says."""
    found = seen or top_k_of(config)
    if not found:
        raise UnsupportedModelError(
            f"the config of family {config.model_type!r} does not say how many experts a token "
            "uses, so no speed can be told; use `melinoe doctor` for its sizes"
        )
    return found


def _all_but_embedding(model: Any, backbone: int) -> int:
    """Bytes that a token reads if no pass can be made: all but the table of tokens."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = head is not None and getattr(head, "weight", None) is table
    return backbone if tied else backbone - table.numel() * table.element_size()
