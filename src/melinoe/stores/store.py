"""The places where experts wait that are not resident, as the engines and training see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from mmap import PAGESIZE
from typing import Any, ClassVar

import torch
from torch import Tensor

from melinoe.experts.format import ExpertFormat, Part
from melinoe.moe.experts import ExpertsLayer


class Store:
    """Holds every expert of every MoE layer; read from, never written to, while serving."""

    kind: ClassVar[str] = ""  # "ram", "pinned" or "disk"
    host_bytes: Any = 0  # of host memory that it holds by itself

    def __init__(self, layers: Sequence[ExpertsLayer] = ()) -> None:
        self._layers = list(layers)  # in the formats in which experts are stored

    @property
    def num_layers(self) -> int:
        """How many MoE layers."""
        return len(self._layers)

    def num_experts(self, layer: int) -> int:
        """How many experts MoE layer *layer* has."""
        return self._layers[layer].num_experts

    def format(self, layer: int) -> ExpertFormat:
        """How the experts of *layer* are stored."""
        return self._layers[layer].format

    def block_bytes(self, layer: int) -> int:
        """Bytes of one expert of *layer*, without padding: what one transfer carries."""
        return self._layers[layer].block_bytes

    def views(self, layer: int, expert: int) -> dict[str, Tensor] | None:
        """One block where it lies in host memory, by part; None if it can only be read."""
        return None

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """Copy one expert into *into*: per part of a block, a view of one slot."""
        raise NotImplementedError


def empty_blocks(parts: Sequence[Part], count: int) -> dict[str, Tensor]:
    """Host memory for *count* experts, by part, each from a page on, to be read into."""
    found = {}
    for part in parts:
        nbytes = count * part.nbytes
        room = torch.empty(nbytes + PAGESIZE, dtype=torch.uint8, device="cpu")
        first = -room.data_ptr() % PAGESIZE
        found[part.name] = room[first : first + nbytes].view(part.dtype).view(count, *part.shape)
    return found


def empty_block(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Host memory for one expert, as `empty_blocks`."""
    return {name: stack[0] for name, stack in empty_blocks(parts, 1).items()}


def read_block(layer: ExpertsLayer, store: Store, expert: int) -> dict[str, Tensor]:
    """One expert of *layer* as *store* holds it, in host memory of its own, by part."""
    block = empty_block(store.format(layer.index).parts(layer.tensors))
    store.read(layer.index, expert, block)
    return block


def read_weights(layer: ExpertsLayer, store: Store, expert: int) -> dict[str, Tensor]:
    """One expert of *layer* as its module has it: unpacked, in the module's types."""
    block, stored = read_block(layer, store, expert), store.format(layer.index)
    if stored.exact:
        return block
    weights = stored.decode(layer.tensors, block)
    return {t.name: weights[t.name].to(t.dtype) for t in layer.tensors}
