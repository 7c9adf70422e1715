"""Load a model, whole or without its experts, with transformers' own from_pretrained."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from melinoe.checkpoint.files import (
    first_line,
    locate,
    read_raw_config,
    split_revision,
    without_mark,
)
from melinoe.checkpoint.metadata import read_metadata
from melinoe.checkpoint.opening import Checkpoint
from melinoe.checkpoint.packed import Weights
from melinoe.checkpoint.safetensors_file import describe_shape, load_whole
from melinoe.errors import CheckpointError
from melinoe.moe.experts import ExpertsLayer, find_experts
from melinoe.moe.finite import broken_weight
from melinoe.moe.routing import fingerprint

_log = logging.getLogger("melinoe")


class _Lazy:
    """Give transformers a stored tensor, which it reads by slicing with ``[...]``."""

    def __init__(self, place: Weights) -> None:
        self.place = place

    def __getitem__(self, _: object) -> torch.Tensor:
        return load_whole(self.place)


def load_backbone(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Any:
    """
    Load everything but the experts onto *device*, in evaluation mode.

    The model comes out of transformers' ``from_pretrained``, so tied weights, buffers and types are
    its own doing; only the experts' parameters are empty, ``(0, ...)``. CheckpointError: a tensor
    is missing or has another shape than the config says; the generation config is not readable; the
    routers are not those that ``melinoe.json`` names.
    """
    model = _without(checkpoint, device)
    wanted = read_metadata(checkpoint.source).get("fingerprint")
    raw = read_raw_config(checkpoint.source)[1]
    own = raw.get("dtype") or raw.get("torch_dtype")
    # In another type than it was written for, the numbers may be rounded otherwise.
    same_type = str(checkpoint.dtype) == f"torch.{own}"
    if wanted is not None and same_type and fingerprint(model) != wanted:
        raise CheckpointError(
            f"the routers of {checkpoint.name} are not those that its melinoe.json was written "
            "for; write or download it again, or delete melinoe.json if they were changed on "
            "purpose"
        )
    return model


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Any:
    """
    Load a whole model onto *device*, in evaluation mode, as transformers does from a directory.

    Unlike transformers it needs no ``metadata`` in the index and takes `Checkpoint.dtype`. Cost:
    the weights once; where transformers must convert experts by computing, which it does a layer
    at a time, three times a layer's experts beside them. CheckpointError as `load_backbone`.
    """
    readers = [reader for source in checkpoint.experts for reader in source.readers.values()]
    if any(reader.pieces(0) is None for reader in readers):
        places = list(checkpoint.tensors.values())
        return _from_pretrained(checkpoint, checkpoint.model_class, places, device, set())
    model = _without(checkpoint, device)
    for source in checkpoint.experts:
        module = model.get_submodule(source.layer.name)
        _take_out(module, source.layer, device, source.num_experts)
        for expert in range(source.num_experts):
            into = {t.name: module.get_parameter(t.name).data for t in source.layer.tensors}
            source.read(expert, {name: stack[expert] for name, stack in into.items()})
    return model


def layers_of(checkpoint: Checkpoint, model: nn.Module) -> list[ExpertsLayer]:
    """Return the checkpoint's MoE layers with the modules of *model*, from `load_backbone`."""
    return [replace(x, module=model.get_submodule(x.name)) for x in checkpoint.layers]


def _take_out(module: Any, layer: ExpertsLayer, device: Any, room: int = 0) -> None:
    """Give *module* uninitialised parameters for *room* experts."""
    for tensor in layer.tensors:
        empty = torch.empty((room, *tensor.shape), dtype=tensor.dtype, device=device)
        module._parameters[tensor.name] = nn.Parameter(empty)


def _without(checkpoint: Checkpoint, device: torch.device | str) -> Any:
    """Load the model; its experts are empty parameters."""
    given = {f"{layer.name}.{t.name}" for layer in checkpoint.layers for t in layer.tensors}
    stripped = _without_experts(checkpoint.model_class)
    model = _from_pretrained(checkpoint, stripped, checkpoint.backbone, device, given)
    model.__class__ = checkpoint.model_class
    shared: dict[tuple[str, int], nn.Parameter] = {}  # layers with the same experts share these too
    for source in checkpoint.experts:
        module: Any = model.get_submodule(source.layer.name)
        _take_out(module, source.layer, device)
        for name, reader in source.readers.items():
            own = module._parameters[name]
            module._parameters[name] = shared.setdefault((name, id(reader.places()[0])), own)
    return model


def _without_experts(model_class: Any) -> Any:
    """Make a class like *model_class* whose instances drop their experts once they are built."""

    def __init__(self, *args, **kwargs):
        model_class.__init__(self, *args, **kwargs)
        for layer in find_experts(self):
            module: Any = layer.module
            assert all(module._parameters[t.name].is_meta for t in layer.tensors)  # no byte yet
            # Not None: some families' own initialisation and tying expect a parameter here.
            _take_out(module, layer, "cpu")
            module._is_hf_initialized = True

    # The same name and module: transformers chooses its conversions by the class's name.
    body = {"__init__": __init__, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), body)


def _from_pretrained(
    checkpoint: Checkpoint,
    model_class: Any,
    places: list[Weights],
    device: torch.device | str,
    given: set[str],
) -> Any:
    """Build *model_class* from stored tensors; only those in *given* may be absent."""
    with _loading_quietly():
        model, info = model_class.from_pretrained(
            None,
            config=checkpoint.config,
            state_dict={place.name: _Lazy(place) for place in places},
            dtype=checkpoint.dtype,
            device_map={"": str(device)} if torch.device(device).type != "cpu" else None,
            ignore_mismatched_sizes=True,  # collected, and refused below in one sentence
            output_loading_info=True,
        )
    _refuse_gaps(checkpoint.name, info, given)
    # Before it runs: attention turns a query that is no number into one, and logits show nothing.
    if (broken := broken_weight(model)) is not None:
        raise CheckpointError(f"{checkpoint.name} is damaged: {broken}; get its files again")
    _name_it(model, checkpoint)
    return model


def _refuse_gaps(name: str, info: dict, experts: set[str]) -> None:
    """Refuse a model with weights that the files do not give, or that do not fit."""
    missing = sorted(set(info["missing_keys"]) - experts)
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the model's tensors, first {missing[0]}; a shard or "
            "a part of its index is missing, download it again"
        )
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{name} has {key} of shape {describe_shape(stored)} where the config says "
            f"{describe_shape(expected)}; the weights do not belong to this config"
        )
    failed = info.get("conversion_errors") or info.get("error_msgs")
    if failed:
        raise CheckpointError(
            f"transformers could not convert {sorted(failed)[0]} of {name}; the weights do not "
            "belong to this config"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        _log.warning("%s: %d stored tensors are not used by the model, first %s",
                     name, len(unexpected), unexpected[0])  # fmt: skip


# How the names of a generation config's true-or-false settings begin.
_SWITCHES = ("output_", "return_", "use_", "do_")


def _name_it(model: Any, checkpoint: Checkpoint) -> None:
    """Set the model's name and generation config, as from_pretrained does with a path."""
    model.config.name_or_path = model.name_or_path = split_revision(checkpoint.name)[0]
    path = locate(checkpoint.source, "generation_config.json")
    if model.can_generate() and path is not None:
        try:
            with without_mark(path) as plain:
                found = GenerationConfig.from_pretrained(plain.parent)
            for name, value in vars(found).items():  # transformers fails at these in mid-generation
                if name.startswith(_SWITCHES) and not isinstance(value, bool | None):
                    raise ValueError(f"{name} is {str(value)[:40]}, not true or false")
            model.generation_config = found
        except Exception as error:
            raise CheckpointError(
                f"{path} is not readable ({first_line(error)}); download it again"
            ) from None


@contextlib.contextmanager
def _loading_quietly() -> Iterator[None]:
    """Let transformers read each tensor when its turn comes, for else it holds experts twice."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
