"""On a miss: wait for the expert, compute it on the host, or both, by costs measured at attach."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.timing import LoadRule, Machine, Work, loads_when
from melinoe.engine.transfer import EmulatedLink, Transfer
from melinoe.moe.compute import Pairs, StandIn
from melinoe.moe.dispatch import experts_function
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, empty_block

_NO_LINK = 1e15  # bytes a second: a copy within host memory crosses no link
_ROWS = 8  # of one expert, to see what each further row takes
_LEAST, _MOST, _ENOUGH_S = 5, 24, 0.2  # runs of one measurement, and when to stop early


@dataclass(frozen=True)
class Misses:
    """Decide what is done about a miss, by figures; there are none with ``wait``."""

    kind: str = "wait"  # "wait": load it; "cpu": compute it on the host; "split": by cost
    machine: Machine | None = None
    work: Work | None = None

    @property
    def rule(self) -> LoadRule | None:
        """The rule to give `melinoe.cache.simulator.simulate` as ``load``, to count the same."""
        if self.machine is None or self.work is None:
            return None
        return loads_when(self.kind, self.machine, self.work)

    def to_dict(self) -> dict[str, Any]:
        """For records: the way, and the figures it rests on."""
        return asdict(self)


class HostExperts:
    """
    One layer's experts, computed on the host where their weights are: activations travel.

    transformers' own function is called with one block of the store in the place of the stacked
    weights: on the CPU with the same bits as from slots. What lies in host memory is used in place;
    else the block is read into one buffer, shared in *buffers* by layers of one shape.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        store: Store,
        device: torch.device,
        transfer: Transfer | None,
        buffers: dict[Any, dict[str, Tensor]],
    ) -> None:
        self.layer = layer
        self._store, self._transfer, self._device = store, transfer, device
        self._forward = experts_function(layer)
        self._stand_ins: dict[int, StandIn] = {}
        self._buffer: dict[str, Tensor] | None = None
        if store.views(layer.index, 0) is None:
            with torch.inference_mode(False):
                self._buffer = buffers.setdefault(layer.parts, empty_block(layer.parts))
        children = {} if device.type == "cpu" else dict(layer.module.named_children())
        # A norm of the module's own is needed here too.
        self._children = {name: copy.deepcopy(child).cpu() for name, child in children.items()}

    def add_to(self, pairs: Pairs, ids: np.ndarray, experts: Sequence[int]) -> None:
        """Compute all *pairs* of *experts*; *ids* is ``top_k_index``, flat, on the host."""
        begin, transfer = time.perf_counter(), self._transfer
        assert transfer is not None
        due = [np.flatnonzero(ids == expert) for expert in experts]
        all_due = np.concatenate(due)
        rows, place = np.unique(pairs.tokens_of(all_due), return_inverse=True)
        hidden = pairs.rows(torch.from_numpy(rows).to(self._device)).cpu()
        transfer.carry_activations(hidden.nbytes)
        outputs = self.compute(hidden, place, experts, [len(one) for one in due])
        transfer.carry_activations(outputs.nbytes)
        pairs.put(torch.from_numpy(all_due).to(self._device), outputs.to(self._device))
        transfer.host_s += time.perf_counter() - begin

    def compute(
        self, hidden: Tensor, place: np.ndarray, experts: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        """Compute ``(pairs, hidden)``, *counts* of each expert, of rows *place* of *hidden*."""
        parts = []
        for expert, rows in zip(experts, torch.from_numpy(place).split(list(counts)), strict=True):
            own = hidden[rows]
            # One choice per row and weight 1: the product and the sum change no bit.
            first = torch.zeros((len(own), 1), dtype=torch.int64, device="cpu")
            parts.append(
                self._forward(self._stand_in(expert), own, first, own.new_ones(first.shape))
            )
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _stand_in(self, expert: int) -> StandIn:
        """An experts module of the one expert, as transformers' function takes it."""
        if self._buffer is not None:
            self._store.read(self.layer.index, expert, self._buffer)
            expert = 0  # always the same buffer
        if expert not in self._stand_ins:
            block = self._buffer or self._store.views(self.layer.index, expert)
            assert block is not None
            slots = {name: tensor.unsqueeze(0) for name, tensor in block.items()}
            made = self._stand_ins[expert] = StandIn(self.layer.module, slots, 1)
            vars(made).update(self._children)
        return self._stand_ins[expert]


def measure_misses(
    kind: str,
    layers: Sequence[ExpertsLayer],
    store: Store,
    device: torch.device,
    link: EmulatedLink | None,
) -> Misses:
    """Time what *kind* rests on; nothing for ``wait``, else a second at most."""
    if kind == "wait":
        return Misses()
    size = float(np.mean([layer.block_bytes for layer in layers]))
    width = next(one for one in layers[0].tensors if one.name == "down_proj").rows_columns[0]
    buffers: dict[Any, dict[str, Tensor]] = {}
    hosts = [HostExperts(layer, store, device, None, buffers) for layer in layers]

    def host_s(rows: int) -> float:
        hidden = torch.randn(rows, width, device="cpu").to(layers[0].pair_dtype)
        place = np.arange(rows)
        with torch.inference_mode():
            return _median_s(lambda n, e: hosts[n].compute(hidden, place, [e], [rows]), layers)

    with torch.inference_mode(False):
        into = [
            {p.name: torch.empty(p.shape, dtype=p.dtype, device=device) for p in layer.parts}
            for layer in layers
        ]

    def read(layer: int, expert: int) -> None:
        store.read(layer, expert, into[layer])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    one_s, read_s = host_s(1), _median_s(read, layers)
    if store.kind == "pinned" and link is None:  # the host does not wait for a copy
        carried = Machine(link_bytes_per_s=size / read_s)
    elif link is None:
        carried = Machine(link_bytes_per_s=_NO_LINK, copy_s=read_s)
    else:
        carried = Machine(
            link_bytes_per_s=link.bandwidth_bytes_per_s,
            link_latency_s=link.latency_s, copy_s=read_s,
        )  # fmt: skip
    machine = replace(
        carried,
        dram_bytes_per_s=size / one_s,
        host_row_s=max((host_s(_ROWS) - one_s) / (_ROWS - 1), 0.0),
    )
    work = Work(expert_bytes=size, activation_bytes=width * layers[0].pair_dtype.itemsize)
    return Misses(kind, machine, work)


def _median_s(run: Callable[[int, int], object], layers: Sequence[ExpertsLayer]) -> float:
    """Median seconds of *run* on random experts, each time another one, after two to warm up."""
    rng = np.random.default_rng(0)
    taken: list[float] = []
    for number in range(_MOST + 2):
        layer = int(rng.integers(len(layers)))
        expert = int(rng.integers(layers[layer].num_experts))
        begin = time.perf_counter()
        run(layer, expert)
        if number >= 2:
            taken.append(time.perf_counter() - begin)
        if len(taken) >= _LEAST and sum(taken) > _ENOUGH_S:
            break
    return float(np.median(taken))
