"""Experts that stay in the checkpoint's own files until they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from melinoe.checkpoint.opening import Checkpoint


class DiskStore:
    """
    Reads an expert from the shards each time it is asked for; holds no expert in host memory.

    The shards stay open. One that is replaced by another file goes on being served from; one that
    is written to in place is refused at the next read. What the system's page cache keeps of them
    is not this store's, and goes when the memory is needed elsewhere.

    Args:
        checkpoint: An opened checkpoint; the store closes it.
    """

    kind: ClassVar[str] = "disk"
    host_bytes: ClassVar[int] = 0

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @property
    def num_layers(self) -> int:
        """How many MoE layers."""
        return len(self._checkpoint.layers)

    def num_experts(self, layer: int) -> int:
        """How many experts MoE layer *layer* has."""
        return self._checkpoint.layers[layer].num_experts

    def block_bytes(self, layer: int) -> int:
        """Bytes of one expert of *layer* in the type it is computed in."""
        return self._checkpoint.layers[layer].block_bytes

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """
        Read one expert into *into*; see `Store.read`.

        Into CPU memory of the stored type the bytes go straight; else through a buffer of the
        size of one stored tensor.

        Raises:
            CheckpointError: a shard was changed since it was opened, or the disk fails.
        """
        self._checkpoint.experts[layer].read(expert, into)

    @property
    def closed(self) -> bool:
        """Whether nothing can be read any more."""
        return self._checkpoint.closed

    def close(self) -> None:
        """Close the shards; nothing can be read afterwards."""
        self._checkpoint.close()
