"""Experts that stay in the checkpoint's own files until they are needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from melinoe.checkpoint.opening import Checkpoint
from melinoe.host_memory import free_host_bytes
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, empty_block

_log = logging.getLogger("melinoe")


class DiskStore(Store):
    """
    Reads an expert from the shards each time it is asked for, by any number of threads at once.

    A shard that is replaced by another file goes on being served from; one that is written to in
    place is refused at the next read. Reads go past the page cache if *direct*; absent: where the
    experts do not fit into free memory. *layers*, in the formats that are read; absent: plain.
    """

    kind = "disk"

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Sequence[ExpertsLayer] | None = None,
        direct: bool | None = None,
    ) -> None:
        super().__init__(checkpoint.layers if layers is None else layers)
        self._checkpoint = checkpoint
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

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """Read one expert; CheckpointError: a shard was changed, or the disk fails."""
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
