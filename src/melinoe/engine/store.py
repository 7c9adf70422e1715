"""What the runtime asks of a place where experts live that are not resident."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from melinoe.moe.experts import ExpertsLayer


@runtime_checkable
class Store(Protocol):
    """
    Holds every expert of every MoE layer; read from, never written to, while serving.

    *kind* says where: ``ram``, ``pinned`` or ``disk``.
    """

    @property
    def kind(self) -> str:
        """``ram``, ``pinned`` or ``disk``."""

    @property
    def num_layers(self) -> int:
        """How many MoE layers."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the store holds by itself."""

    def num_experts(self, layer: int) -> int:
        """How many experts MoE layer *layer* has."""

    def block_bytes(self, layer: int) -> int:
        """Bytes of one expert of *layer*, without padding: what one transfer carries."""

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """
        Copy one expert into *into*.

        Args:
            layer: MoE layer, in ``find_experts`` order.
            expert: id in ``[0, num_experts(layer))``.
            into: per parameter name, a view of one slot, shaped without the experts' dimension.
        """


def read_expert(layer: ExpertsLayer, store: Store, expert: int) -> dict[str, Tensor]:
    """One expert of *layer* in host memory of its own, by parameter name."""
    block = {t.name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in layer.tensors}
    store.read(layer.index, expert, block)
    return block
