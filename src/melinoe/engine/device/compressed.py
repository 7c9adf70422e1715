"""Experts in host memory as 8- or 4-bit codes; what is read back is what the codes stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from melinoe.engine.device.expanding import Section
from melinoe.engine.device.quantize import BITS, GROUP, Codes, dequantise, quantisable, quantise
from melinoe.engine.ram_store import PinnedStore, RamStore
from melinoe.engine.weights import free_weights
from melinoe.errors import AttachError
from melinoe.experts.format import Part
from melinoe.moe.experts import ExpertsLayer

_ALIGNMENT = 64


class CompressedStore:
    """
    All experts as codes, each expert one contiguous block.

    Matrices are stored in codes, with a scale and a minimum for every 64 weights; biases as they
    are. The codes are made once, when an expert is written.

    Args:
        layers: as `find_experts` lists them; their weights are not read.
        compression: ``int8`` or ``int4``.
        pinned: page-locked, for a GPU to read.

    Raises:
        AttachError: an unknown compression, or nothing to pin for.
        BudgetError: the host does not have the memory.
    """

    _raw: ClassVar[str] = "block"

    def __init__(
        self, layers: Sequence[ExpertsLayer], compression: str, pinned: bool = False
    ) -> None:
        if compression not in BITS:
            raise AttachError(
                f"there is no compression {compression!r}; choose one of {', '.join(BITS)}, or "
                "leave it out"
            )
        self.compression, self.bits = compression, BITS[compression]
        self._layers = tuple(layers)
        self._sections: list[list[Section]] = []
        sizes = []
        for layer in layers:
            sections, size = _layout(layer, self.bits)
            self._sections.append(sections)
            sizes.append(size)
        # Reuse how the stores allocate and lock memory: one tensor of bytes per expert.
        raw = [
            ExpertsLayer(
                layer.index,
                layer.name,
                layer.module,
                layer.num_experts,
                (Part(self._raw, (size,), torch.uint8),),
            )
            for layer, size in zip(layers, sizes, strict=True)
        ]
        self._store = (PinnedStore if pinned else RamStore)(raw)

    @classmethod
    def from_modules(
        cls, layers: Sequence[ExpertsLayer], compression: str, pinned: bool = False
    ) -> Self:
        """
        Move the weights of *layers* out of their modules, which keep empty parameters.

        What was rounded stays rounded: the exact weights are gone.

        Raises:
            AttachError, BudgetError: as the constructor, or a weight that has no code; the modules
                are as before.
        """
        store = cls(layers, compression, pinned)
        for layer in layers:
            for expert in range(layer.num_experts):
                own = {t.name: layer.module.get_parameter(t.name)[expert] for t in layer.tensors}
                store.write(layer.index, expert, own)
        for layer in layers:  # only now: a weight without a code leaves the model as it was
            free_weights(layer)
        return store

    @property
    def kind(self) -> str:
        """``ram`` or ``pinned``."""
        return self._store.kind

    @property
    def num_layers(self) -> int:
        """How many MoE layers."""
        return self._store.num_layers

    @property
    def host_bytes(self) -> int:
        """Bytes of all blocks, with the padding between their parts."""
        return self._store.host_bytes

    def num_experts(self, layer: int) -> int:
        """How many experts MoE layer *layer* has."""
        return self._store.num_experts(layer)

    def block_bytes(self, layer: int) -> int:
        """Bytes of one expert of *layer* as codes: what one transfer carries."""
        return self._store.block_bytes(layer)

    def sections(self, layer: int) -> list[Section]:
        """The parts of a block of *layer*."""
        return self._sections[layer]

    def views(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One block of codes, as bytes."""
        return self._store.views(layer, expert)

    def write(self, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """
        Quantise *tensors* into one block.

        Raises:
            AttachError: a weight has no code.
        """
        block = self.views(layer, expert)[self._raw]
        for section in self._sections[layer]:
            weights = tensors[section.name].detach().cpu().contiguous()
            if section.scales is None:
                _write(block, section.offset, weights)
                continue
            codes, scale, minimum = quantise(weights, self.bits)
            if self.bits == 4:
                codes = codes[:, : GROUP // 2] | codes[:, GROUP // 2 :] << 4
            _write(block, section.offset, codes)
            _write(block, section.scales, torch.stack([scale, minimum], dim=1))

    def read(self, layer: int, expert: int, into: Mapping[str, Tensor]) -> None:
        """Write what the codes of one expert stand for into *into*; see `Store.read`."""
        block = self.views(layer, expert)[self._raw]
        for section in self._sections[layer]:
            view = into[section.name]
            if section.scales is None:
                raw = block[section.offset :][: section.numel * view.dtype.itemsize]
                view.copy_(raw.view(view.dtype).view(view.shape))
                continue
            groups = section.numel // GROUP
            codes = block[section.offset :][: section.numel * self.bits // 8].view(groups, -1)
            if self.bits == 4:
                codes = torch.cat([codes & 15, codes >> 4], dim=1)
            pairs = block[section.scales :][: groups * 4].view(torch.float16).view(groups, 2)
            weights = dequantise(Codes(codes, pairs[:, 0], pairs[:, 1]), view.dtype)
            view.copy_(weights.view(view.shape))


def block_bytes(layer: ExpertsLayer, compression: str) -> int:
    """Bytes of one expert of *layer* as codes."""
    return _layout(layer, BITS[compression])[1]


def _layout(layer: ExpertsLayer, bits: int) -> tuple[list[Section], int]:
    """Where the parts of a block lie, and how long it is."""
    sections, end = [], 0

    def place(nbytes: int) -> int:
        nonlocal end
        begin, end = end, end + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return begin

    for tensor in layer.tensors:
        numel = tensor.nbytes // tensor.dtype.itemsize
        if not quantisable(tensor.shape):
            sections.append(Section(tensor.name, numel, place(tensor.nbytes), None))
            continue
        offset = place(numel * bits // 8)
        sections.append(Section(tensor.name, numel, offset, place(numel // GROUP * 4)))
    return sections, end


def _write(block: Tensor, offset: int, values: Tensor) -> None:
    data = values.contiguous().reshape(-1).view(torch.uint8)
    block[offset : offset + data.numel()] = data
