"""Experts that stay in the checkpoint's own files until they are needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from melinoe.checkpoint.opening import Checkpoint
from melinoe.experts.format import ExpertFormat
from melinoe.host_memory import free_host_bytes
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import empty_block

_log = logging.getLogger("melinoe")


class DiskStore:
    """
    Reads an expert from the shards each time it is asked for, by any number of threads at once.

    A shard that is replaced by another file goes on being served from; one that is written to in
    place is refused at the next read. Reads go past the page cache if *direct*; absent: where the
    experts do not fit into free memory. *layers*, in the formats that are read; absent: plain.
    """

    kind: ClassVar[str] = "disk"
    host_bytes: ClassVar[int] = 0

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[ExpertsLayer] | None = None,
        direct: bool | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._layers = checkpoint.layers if layers is None else layers
        if direct is None:
            free = free_host_bytes()
            direct = free is not None and checkpoint.expert_bytes > free
        if direct:
            try:
                for place in checkpoint.files.values():
                    place.file.read_past_cache()
            except OSError as error:
                _log.warning(
                    "the files of %s cannot be read past the system's page cache (%s), so they are "
                    "read through it, which is slower where memory is short",
                    checkpoint.name, error.strerror or error,
                )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """How many MoE layers."""
        return len(self._layers)

    def num_experts(self, layer: int) -> int:
        """How many experts MoE layer *layer* has."""
        return self._layers[layer].num_experts

    def block_bytes(self, layer: int) -> int:
        """Bytes of one expert of *layer*."""
        return self._layers[layer].block_bytes

    def format(self, layer: int) -> ExpertFormat:
        """How the experts of *layer* are read."""
        return self._layers[layer].format

    def views(self, layer: int, expert: int) -> None:
        """Nothing lies in host memory."""

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """
        Read one expert into *into*; straight there on the CPU, else through a block in host memory.

        CheckpointError: a shard was changed since it was opened, or the disk fails.
        """
        source, stored = self._checkpoint.experts[layer], self.format(layer)
        devices = {part.device.type for part in into.values()}
        if stored.exact or devices == {"cpu"}:
            source.read_block(expert, stored, into)
            return
        block = empty_block(self._layers[layer].parts)
        source.read_block(expert, stored, block)
        for name, part in block.items():
            into[name].copy_(part)

    @property
    def closed(self) -> bool:
        """Whether nothing can be read any more."""
        return self._checkpoint.closed

    def close(self) -> None:
        """Close the shards; nothing can be read afterwards."""
        self._checkpoint.close()
