"""Compute missing experts where their weights are, on the host: activations travel, weights stay.

The arithmetic is transformers' own function again, called with one block of the store in the place
of the stacked weights. A part of a product of matrices is one product for each expert there, over
the same rows, so on the CPU the result has the same bits as from slots. On a GPU's model the host's
product rounds otherwise than the GPU's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from melinoe.engine.ram_store import RamStore
from melinoe.engine.store import Store
from melinoe.engine.transfer import Transfer
from melinoe.moe.compute import Forward, Pairs, StandIn
from melinoe.moe.dispatch import transformers_function
from melinoe.moe.experts import ExpertsLayer


class HostExperts:
    """
    One layer's experts, computed from the store's blocks.

    A store in host memory is computed from in place. Of any other store the block is read into one
    buffer of the size of an expert first; that is no transfer into a slot and not counted as one.

    Args:
        layer: the layer.
        store: holds its experts.
        threads: torch's threads while it computes; None leaves them as they are.
        device: where the slots are.
        transfer: told what travels, and how long it took; absent while costs are measured.
        forward: transformers' function; absent: the one that the module would use.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        store: Store,
        threads: int | None,
        device: torch.device,
        transfer: Transfer | None = None,
        forward: Forward | None = None,
    ) -> None:
        self.layer = layer
        self.threads = threads
        self._store = store
        self._transfer = transfer
        self._device = device
        self._forward = forward or transformers_function(layer.module)
        self._stand_ins: dict[int, StandIn] = {}
        self._buffer: dict[str, Tensor] | None = None
        if not isinstance(store, RamStore):
            with torch.inference_mode(False):
                self._buffer = {
                    t.name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in layer.tensors
                }
        # A norm of the module's own is needed here too.
        self._children = (
            {}
            if device.type == "cpu"
            else {n: copy.deepcopy(m).cpu() for n, m in layer.module.named_children()}
        )

    def add_to(self, pairs: Pairs, ids: np.ndarray, experts: Sequence[int]) -> None:
        """
        Compute all pairs of *experts*, and put them where they belong.

        Args:
            pairs: of the request.
            ids: ``top_k_index``, flat, on the host.
            experts: what to compute here.
        """
        begin = time.perf_counter()
        due = [np.flatnonzero(ids == expert) for expert in experts]
        all_due = np.concatenate(due)
        rows, place = np.unique(pairs.tokens_of(all_due), return_inverse=True)
        hidden = pairs.rows(torch.from_numpy(rows).to(self._device)).cpu()
        self._travel(hidden)
        outputs = self.compute(hidden, place, experts, [len(one) for one in due])
        self._travel(outputs)
        pairs.put(torch.from_numpy(all_due).to(self._device), outputs.to(self._device))
        if self._transfer is not None:
            self._transfer.host_s += time.perf_counter() - begin

    def compute(
        self, hidden: Tensor, place: np.ndarray, experts: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """
        The experts' outputs for rows of *hidden*, unweighted.

        Args:
            hidden: ``(rows, hidden)``, on the host, in the experts' dtype.
            place: row of each pair; those of the first expert first.
            experts: ids.
            counts: how many pairs each has.

        Returns:
            ``(pairs, hidden)``, in the order of *place*.
        """
        parts, begin = [], 0
        index = torch.from_numpy(place)
        with _threads(self.threads):
            for expert, count in zip(experts, counts, strict=True):
                of_expert = hidden[index[begin : begin + count]]
                # One choice per row and weight 1: the product and the sum change no bit.
                first = torch.zeros((count, 1), dtype=torch.int64, device="cpu")
                ones = of_expert.new_ones((count, 1))
                parts.append(self._forward(self._stand_in(expert), of_expert, first, ones))
                begin += count
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _stand_in(self, expert: int) -> StandIn:
        """Looks like an experts module of the one expert."""
        if self._buffer is not None:
            self._store.read(self.layer.index, expert, self._buffer)
            expert = 0  # always the same buffer
        made = self._stand_ins.get(expert)
        if made is None:
            block: Mapping[str, Tensor]
            if self._buffer is not None:
                block = self._buffer
            else:
                assert isinstance(self._store, RamStore)
                block = self._store.views(self.layer.index, expert)
            slots = {name: tensor.unsqueeze(0) for name, tensor in block.items()}
            made = self._stand_ins[expert] = StandIn(self.layer.module, slots, 1)
            for name, child in self._children.items():
                setattr(made, name, child)
        return made

    def _travel(self, activations: Tensor) -> None:
        if self._transfer is not None:
            self._transfer.carry_activations(activations.nbytes)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """So many threads for torch in the body of the ``with`` statement."""
    before = torch.get_num_threads()
    if wanted is None or wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
