"""Take the stacked weights out of an experts module, and put them back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from melinoe.errors import AttachError
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, read_weights


def free_weights(layer: ExpertsLayer, device: torch.device | None = None) -> None:
    """
    Replace the stacked parameters of *layer* by empty ones, ``(0, ...)``; their memory is freed.
    The parameter objects stay, unless they were on the meta device. An empty parameter follows the
    model in ``model.to(...)``, which shows that the model was moved.
    """
    for tensor in layer.tensors:
        old = getattr(layer.module, tensor.name)
        where = device or old.device
        with torch.inference_mode(False):
            empty = torch.empty((0, *tensor.shape), dtype=tensor.dtype, device=where)
        _put(layer.module, tensor.name, empty)


def give_weights_back(
    layer: ExpertsLayer, store: Store, device: torch.device | str | None = None
) -> None:
    """Fill the empty parameters of *layer* from *store*; *device* absent: where they are."""
    with torch.inference_mode(False), torch.no_grad():
        full = {}
        for tensor in layer.tensors:
            where = device or getattr(layer.module, tensor.name).device
            shape = (layer.num_experts, *tensor.shape)
            full[tensor.name] = torch.empty(shape, dtype=tensor.dtype, device=where)
        for expert in range(layer.num_experts):
            if store.format(layer.index).exact:
                store.read(layer.index, expert, {name: full[name][expert] for name in full})
                continue
            for name, weights in read_weights(layer, store, expert).items():
                full[name][expert].copy_(weights)
        for name, stacked in full.items():
            _put(layer.module, name, stacked)


def weights_of(layer: ExpertsLayer) -> dict[str, torch.Tensor]:
    """The stacked parameters of *layer* by name."""
    return {tensor.name: layer.module.get_parameter(tensor.name) for tensor in layer.tensors}


def put_weights(layer: ExpertsLayer, weights: Mapping[str, torch.Tensor]) -> None:
    """Make *weights* the stacked parameters of *layer* again."""
    for name, stacked in weights.items():
        _put(layer.module, name, stacked)


def is_freed(layer: ExpertsLayer) -> bool:
    """Whether the stacked parameters of *layer* are empty."""
    return not len(layer.module.get_parameter("down_proj"))


# How Python copies an object, pickles it, and how torch copies a module to several devices.
_COPYING = ("__deepcopy__", "__reduce_ex__", "_replicate_for_data_parallel")


def refuse_copies(layer: ExpertsLayer) -> Callable[[], None]:
    """Refuse to save, pickle or copy the model, its weights being in a store; returns the undo."""

    def refuse(*_: object) -> None:
        raise AttachError(
            f"the weights of {layer.name} are in the expert store, so the model's state cannot be "
            "read, as to save it, copy it or load an adapter; call handle.detach() first, serve "
            "the adapter with melinoe.adapters, or merge it into the checkpoint (`melinoe merge`)"
        )

    hook = layer.module.register_state_dict_pre_hook(refuse)
    vars(layer.module).update(dict.fromkeys(_COPYING, refuse))

    def undo() -> None:
        hook.remove()
        for name in _COPYING:
            vars(layer.module).pop(name, None)

    return undo


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter's contents; in the same object where torch allows it."""
    old = getattr(module, name)
    if old.device.type == "meta" or old.device != tensor.device:
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        old.data = tensor
