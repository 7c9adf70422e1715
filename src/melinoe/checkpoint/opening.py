"""Open a checkpoint, or describe it: all about it is known and checked before a weight is read."""

import contextlib
import copy
import logging
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from melinoe.checkpoint.files import (
    close_shards,
    first_line,
    has_weights,
    is_directory,
    open_shards,
    pinned,
    read_config,
    read_raw_config,
)
from melinoe.checkpoint.packed import SUMS, Weights, expert_format, find_packing, unpack
from melinoe.checkpoint.safetensors_file import Place, Stamp
from melinoe.checkpoint.sources import (
    ExpertSource,
    group_by_parameter,
    reader_for,
    refuse_integers,
    split,
)
from melinoe.errors import CheckpointError, ModelError, UnsupportedModelError
from melinoe.moe.experts import PLAIN_DTYPES, TOP_K, ExpertsLayer, find_experts
from melinoe.moe.routing import find_routers

_log = logging.getLogger("melinoe")


@dataclass
class Checkpoint:
    """An opened checkpoint, its headers checked, no weights read. Use it with ``with``."""

    name: str  # the directory or hub name it was opened by
    source: str  # the same at the commit that its files are of, as ``org/model@commit``
    config: PreTrainedConfig  # with the type to compute in
    model_class: type  # that its architecture names
    dtype: torch.dtype  # that the weights are given in memory
    files: dict[str, Place]  # stored name -> where it lies
    tensors: dict[str, Weights]  # packed ones under the name of the plain ones
    layers: list[ExpertsLayer]  # their modules are on the meta device
    experts: list[ExpertSource]  # one for each layer
    backbone: list[Weights]  # every stored tensor that belongs to no expert

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts in `dtype`."""
        return sum(layer.num_experts * layer.block_bytes for layer in self.layers)

    @property
    def backbone_bytes(self) -> int:
        """Bytes of all that belongs to no expert, in `dtype`."""
        return sum(prod(place.info.shape) * self.dtype.itemsize for place in self.backbone)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(place.info.nbytes for place in self.files.values())

    @property
    def stamps(self) -> dict[Path, Stamp]:
        """Each shard's stamp by its path; see `check_same`."""
        return {place.file.path: place.file.stamp for place in self.files.values()}

    @property
    def closed(self) -> bool:
        """Whether a shard is closed, so that not everything can be read."""
        return any(place.file.closed for place in self.files.values())

    def close(self) -> None:
        """Close the shards; sources cannot read afterwards."""
        close_shards(self.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    name: str, dtype: torch.dtype | str = "auto", download: bool = True
) -> Checkpoint:
    """
    Open a checkpoint of the hub's layout, and find out where each expert lies.

    Costs the headers' bytes and a model without weights, and the download of a hub checkpoint
    that is not in the local cache. The family is checked before that.

    Args:
        name: A directory, or a repository on the hub: ``org/model``, ``org/model@revision``.
        dtype: Of plain weights in memory; "auto": the config's, else that of most stored bytes.
        download: Fetch hub files that are not in the local cache.

    Raises:
        CheckpointError: files missing, torn, packed in an unknown way, or of another model.
        UnsupportedModelError: the family has no experts that can be served.
    """
    name = str(name)
    wanted = None if dtype == "auto" else as_dtype(dtype)
    source = pinned(name, read_raw_config(name, download)[0])
    raw = read_raw_config(source, download)[1]
    config = read_config(source, download)
    model_class = find_model_class(config)
    if download and not is_directory(name):
        find_experts(build_on_meta(model_class, copy.deepcopy(config), torch.bfloat16))
    files = open_shards(source, download)
    try:
        resolved = wanted or _own_dtype(name, config, files, find_packing(raw) is not None)
        tensors = unpack(files, raw, name, resolved)
        model = build_on_meta(model_class, config, resolved)
        layers = [_with_plan(layer, model, resolved) for layer in find_experts(model)]
        experts, backbone = _sources(model, config, layers, tensors, files)
    except BaseException:
        close_shards(files)
        raise
    return Checkpoint(
        name, source, config, model_class, resolved, files, tensors, layers, experts, backbone
    )


def _sources(
    model: Any,
    config: PreTrainedConfig,
    layers: list[ExpertsLayer],
    tensors: dict[str, Weights],
    files: dict[str, Place],
) -> tuple[list[ExpertSource], list[Weights]]:
    """Make one source for each layer; return also the weights that belong to none."""
    shapes = {
        f"{layer.name}.{tensor.name}": (layer.num_experts, *tensor.shape)
        for layer in layers
        for tensor in layer.tensors
    }
    groups = group_by_parameter(model, tensors)
    refuse_integers(model, groups)
    found, backbone = split(groups, shapes)
    tied = model.all_tied_weights_keys
    sources = []
    for layer in layers:
        readers = {}
        for tensor in layer.tensors:
            name = f"{layer.name}.{tensor.name}"
            if name not in found and tied.get(name) in found:
                name = tied[name]  # stored once for two layers that share their experts
            if name not in found:
                raise CheckpointError(
                    f"the checkpoint has no tensor for {name}; a shard or a part of its index is "
                    "missing, download it again"
                )
            readers[tensor.name] = reader_for(found[name], name, shapes[name], config)
        sums = files.get(f"{layer.name}{SUMS}")
        fits = sums is not None and sums.info.shape == (layer.num_experts,)
        sources.append(ExpertSource(layer, readers, sums if fits else None))
    return sources, backbone


def find_model_class(config: PreTrainedConfig) -> Any:
    """Find the transformers class that a config's architecture names, or else its family."""
    named = config.architectures
    if named and not (isinstance(named, list) and isinstance(named[0], str)):
        raise CheckpointError(
            'the "architectures" of config.json are no list of names; download it again'
        )
    if named:
        found = getattr(transformers, named[0], None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no architecture "
            f"{named[0]}; use a family that transformers itself implements"
        )
    with contextlib.suppress(KeyError):
        return AutoModelForCausalLM._model_mapping[type(config)]
    raise UnsupportedModelError(
        f"the config of family {config.model_type!r} names no architecture, and the family has no "
        'language model; add "architectures" to config.json'
    )


def build_on_meta(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Build the model without a byte of weights; also sets *dtype* on *config*."""
    try:
        with torch.device("meta"):
            return model_class._from_config(config, dtype=dtype)
    except Exception as error:  # whatever a family's code trips over
        raise CheckpointError(
            f"transformers cannot build {model_class.__name__} from the config "
            f"({type(error).__name__}: {first_line(error)}); give the model's own config.json"
        ) from error


def _with_plan(layer: ExpertsLayer, model: Any, dtype: torch.dtype) -> ExpertsLayer:
    """Apply the family's wish to keep some parameters in float32, as from_pretrained does."""
    tensors = list(layer.tensors)
    for pattern, wanted in model._get_dtype_plan(dtype).items():
        for number, tensor in enumerate(tensors):
            if re.search(pattern.replace("*", ".*"), f"{layer.name}.{tensor.name}"):
                tensors[number] = replace(tensor, dtype=wanted)
    return replace(layer, tensors=tuple(tensors))


# --- the type of the weights ----------------------------------------------------------------------


def as_dtype(dtype: Any) -> torch.dtype:
    """Find a floating-point type by itself or by its name; ValueError if it is none."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in PLAIN_DTYPES:
        known = ", ".join(map(_word, PLAIN_DTYPES))
        raise ValueError(f"dtype must be 'auto' or one of {known}, not {dtype!r}")
    return found


def dtype_of(config: PreTrainedConfig) -> torch.dtype | None:
    """Read the type of weights that a config, or its part for text, names; None if neither does."""
    told = config.dtype or getattr(config.get_text_config(), "dtype", None)
    try:
        return None if told is None else as_dtype(told)
    except ValueError:
        raise CheckpointError(
            f'the config names the type {told}; give "dtype" in config.json as bfloat16, '
            "float16 or float32"
        ) from None


def _own_dtype(
    name: str, config: PreTrainedConfig, files: dict[str, Place], packed: bool
) -> torch.dtype:
    """Choose the config's type, else that of most bytes; say so where the two leave a doubt."""
    told = dtype_of(config)
    if packed:  # the stored types are those of scales
        return told or torch.bfloat16
    amounts: Counter[torch.dtype] = Counter()
    for place in files.values():
        if place.info.dtype in PLAIN_DTYPES:
            amounts[place.info.dtype] += place.info.nbytes
    if not amounts:
        raise CheckpointError("the checkpoint holds no floating-point tensor; download it again")
    ((most, share),) = amounts.most_common(1)
    part = f"{100 * share / amounts.total():.0f} % of the stored bytes"
    if told is None and len(amounts) > 1:
        _say_once(
            f"{name}: config.json names no type; its weights are taken as {_word(most)}, like "
            f"{part}"
        )
    if told is not None and told != most and told.itemsize > most.itemsize:
        _say_once(
            f"{name}: loaded as {_word(told)}, for config.json says so, but {part} are "
            f'{_word(most)}; to take less memory, set "dtype" there to "{_word(most)}"'
        )
    return told or most


def guess_dtype(name: str, config: PreTrainedConfig) -> torch.dtype:
    """Choose the type as `open_checkpoint` would; bfloat16 where no weights are here to tell."""
    if (told := dtype_of(config)) is not None:
        return told
    try:
        packed = find_packing(read_raw_config(name)[1]) is not None
        files = open_shards(name, download=False)
    except CheckpointError:
        return torch.bfloat16
    try:
        return _own_dtype(name, config, files, packed)
    finally:
        close_shards(files)


@cache
def _say_once(sentence: str) -> None:
    _log.warning("%s", sentence)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- a checkpoint described without reading it ----------------------------------------------------


@dataclass(frozen=True)
class Description:
    """Hold what a checkpoint's config and its files' headers tell."""

    name: str
    model_type: str | None
    architecture: str | None
    supported: bool  # whether it can be served as it is
    reason: str | None  # why not
    weights: bool  # whether weight files are there; without them the numbers are the config's
    dtype: str | None = None  # that the weights are given in memory, like ``bfloat16``
    format: str | None = None  # how experts are stored: ``plain``, or packed, like ``mxfp4``
    moe_layers: int = 0
    num_experts: int = 0  # of a layer; the most, where layers differ
    top_k: int | None = None  # None where the config does not say
    bytes_per_expert: int = 0  # in one layer, as stored; the most, where layers differ
    expert_bytes: int = 0  # of all experts of all layers
    backbone_bytes: int = 0  # of all else
    layers: tuple[tuple[int, int], ...] = ()  # of each: experts, and bytes of one

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON can hold them."""
        return asdict(self)


def describe(name: str, dtype: torch.dtype | str = "auto") -> Description:
    """
    Describe a checkpoint from its config, and check its files' headers where they are at hand.

    Weights are neither read nor downloaded: for a name on the hub only the config is fetched, and
    headers are checked if the weights are in the local cache. CheckpointError where there is no
    readable config.
    """
    name = str(name)
    wanted = None if dtype == "auto" else as_dtype(dtype)
    _, raw = read_raw_config(name)
    named = raw.get("architectures")
    weights = has_weights(name)
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
    top_k = top_k_of(config)
    with contextlib.suppress(UnsupportedModelError):  # such a router can still be served
        top_k = find_routers(model)[0].top_k or top_k
    stored = [replace(one, format=expert_format(raw, name, one.name)) for one in layers]
    return _of_layers(stored) | {
        "backbone_bytes": everything - plain,
        "dtype": _word(dtype),
        "top_k": top_k,
    }


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
