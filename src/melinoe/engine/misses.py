"""
On a miss: wait for the expert, compute it on the host, or both, by costs measured at attach.

The figures are of this machine, this model's experts and this store: how long the host takes to
compute one missing expert, with the number of threads that is fastest, and how long one takes to
come. The simulator is told the same rule, so its counts stay the engine's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.cache.timing import LoadRule, Machine, Work, loads_when
from melinoe.config import MISSES
from melinoe.engine.transfer import EmulatedLink, Transfer
from melinoe.errors import AttachError
from melinoe.experts.format import Part
from melinoe.moe.compute import Forward, Pairs, StandIn
from melinoe.moe.dispatch import experts_function
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, empty_block

_NO_LINK = 1e15  # bytes a second: a copy within host memory crosses no link
_ROWS = 8  # of one expert, to see what each further row takes
_LEAST, _MOST, _ENOUGH_S = 5, 24, 0.2  # runs of one measurement, and when to stop early
_WORTH = 0.95  # more threads must take at most this share of the time


@dataclass(frozen=True)
class Misses:
    """
    Decide what is done about a miss.

    Attributes:
        kind: ``wait``: load it; ``cpu``: compute it on the host; ``split``: by cost.
        machine: The figures that decide, and that a time model takes; None with ``wait``.
        work: The model's.
    """

    kind: str = "wait"
    machine: Machine | None = None
    work: Work | None = None

    @property
    def rule(self) -> LoadRule | None:
        """The rule to give `melinoe.cache.simulator.simulate` as ``load``, to count the same."""
        if self.machine is None or self.work is None:
            return None
        return loads_when(self.kind, self.machine, self.work)

    @property
    def threads(self) -> int | None:
        """Threads of the host while it computes a miss."""
        return None if self.machine is None else self.machine.host_threads

    def to_dict(self) -> dict[str, Any]:
        """For records: the way, and the figures it rests on."""
        return {
            "kind": self.kind,
            "machine": None if self.machine is None else asdict(self.machine),
            "work": None if self.work is None else asdict(self.work),
        }


def check_miss(miss: str | Misses, threads: int | None) -> None:
    """
    Refuse what cannot be before anything is moved.

    Raises:
        AttachError: an unknown way; threads below 1, or for a way that computes nothing.
    """
    kind = miss if isinstance(miss, str) else miss.kind
    if kind not in MISSES:
        raise AttachError(
            f"misses cannot be handled by {kind!r}; choose one of {', '.join(MISSES)}"
        )
    if threads is None:
        return
    if kind == "wait" or not isinstance(miss, str):
        raise AttachError(
            "miss_threads are those of the host while it computes misses; give miss='cpu' or "
            "'split' with them, or leave them out"
        )
    if threads < 1:
        raise AttachError(f"miss_threads cannot be {threads}; give 1 or more")


class HostExperts:
    """
    One layer's experts, computed on the host where their weights are: activations travel.

    The arithmetic is transformers' own function, called with one block of the store in the place of
    the stacked weights. There too it is one product for each expert, over the same rows, so on the
    CPU the result has the same bits as from slots; a GPU rounds otherwise. A store in host memory
    is computed from in place. Of any other store the block is read into one buffer first; that is
    no transfer into a slot and not counted as one.

    Args:
        layer: The layer.
        store: Holds its experts.
        threads: Torch's threads while it computes; None leaves them as they are.
        device: Where the slots are.
        transfer: Told what travels, and how long it took; absent while costs are measured.
        forward: An experts function; absent: the one of the layer's format.
        buffers: Of all layers, so that those of the same shape read into the same memory; absent:
            its own.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        store: Store,
        threads: int | None,
        device: torch.device,
        transfer: Transfer | None = None,
        forward: Forward | None = None,
        buffers: dict[tuple[Part, ...], dict[str, Tensor]] | None = None,
    ) -> None:
        self.layer = layer
        self.threads = threads
        self._store = store
        self._transfer = transfer
        self._device = device
        self._forward = forward or experts_function(layer)
        self._stand_ins: dict[int, StandIn] = {}
        self._buffer: dict[str, Tensor] | None = None
        if store.views(layer.index, 0) is None:
            buffers = {} if buffers is None else buffers
            if layer.parts not in buffers:
                with torch.inference_mode(False):
                    buffers[layer.parts] = empty_block(layer.parts)
            self._buffer = buffers[layer.parts]
        # A norm of the module's own is needed here too.
        self._children = (
            {}
            if device.type == "cpu"
            else {n: copy.deepcopy(m).cpu() for n, m in layer.module.named_children()}
        )

    def add_to(self, pairs: Pairs, ids: np.ndarray, experts: Sequence[int]) -> None:
        """Compute all *pairs* of *experts*; *ids* is ``top_k_index``, flat, on the host."""
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
        Compute unweighted outputs for rows of *hidden*.

        Args:
            hidden: ``(rows, hidden)``, on the host, in the experts' dtype.
            place: Row of each pair; those of the first expert first.
            experts: Ids.
            counts: How many pairs each has.

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
        """An experts module of the one expert, as transformers' function takes it."""
        if self._buffer is not None:
            self._store.read(self.layer.index, expert, self._buffer)
            expert = 0  # always the same buffer
        made = self._stand_ins.get(expert)
        if made is None:
            block = self._buffer or self._store.views(self.layer.index, expert)
            assert block is not None
            slots = {name: tensor.unsqueeze(0) for name, tensor in block.items()}
            made = self._stand_ins[expert] = StandIn(self.layer.module, slots, 1)
            for name, child in self._children.items():
                setattr(made, name, child)
        return made

    def _travel(self, activations: Tensor) -> None:
        if self._transfer is not None:
            self._transfer.carry_activations(activations.nbytes)


def measure_misses(
    kind: str,
    layers: Sequence[ExpertsLayer],
    store: Store,
    device: torch.device,
    link: EmulatedLink | None,
    threads: int | None = None,
) -> Misses:
    """
    Time what *kind* rests on; nothing for ``wait``, else a second or two at most.

    Args:
        kind: As in `Misses`.
        layers: The model's.
        store: Holds their experts.
        device: Where the slots are.
        link: The emulated link, if any.
        threads: Of the host; absent: of 1, 2, 4, ... up to torch's own number, the fewest that
            are about as fast as any.
    """
    if kind == "wait":
        return Misses()
    size = mean_block_bytes(store)
    buffers: dict[tuple[Part, ...], dict[str, Tensor]] = {}
    hosts = [HostExperts(layer, store, None, device, buffers=buffers) for layer in layers]
    tried = [threads] if threads is not None else _candidates()
    best, best_s = tried[0], float("inf")
    for count in tried:
        taken = _time_host(hosts, count, rows=1)
        if taken < _WORTH * best_s:
            best, best_s = count, taken
    more = (_time_host(hosts, best, rows=_ROWS) - best_s) / (_ROWS - 1)
    machine = link_figures(store, link, time_read(layers, store, device))
    machine = replace(
        machine, dram_bytes_per_s=size / best_s, host_row_s=max(more, 0.0), host_threads=best
    )
    work = Work(expert_bytes=size, activation_bytes=activation_bytes(layers[0]))
    return Misses(kind, machine, work)


def link_figures(store: Store, link: EmulatedLink | None, read_s: float) -> Machine:
    """
    How experts come into slots.

    Args:
        store: Where from.
        link: The emulated link, whose own figures count.
        read_s: From `time_read`: the copy itself.
    """
    if link is not None:
        return Machine(
            link_bytes_per_s=link.bandwidth_bytes_per_s,
            link_latency_s=link.latency_s,
            copy_s=read_s,
        )
    if store.kind == "pinned":  # the host does not wait for it
        return Machine(link_bytes_per_s=mean_block_bytes(store) / read_s)
    return Machine(link_bytes_per_s=_NO_LINK, copy_s=read_s)


def time_read(layers: Sequence[ExpertsLayer], store: Store, device: torch.device) -> float:
    """Seconds of reading one expert from the store into a slot, alone: the median over some."""
    with torch.inference_mode(False):
        into = [
            {p.name: torch.empty(p.shape, dtype=p.dtype, device=device) for p in layer.parts}
            for layer in layers
        ]

    def read(layer: int, expert: int) -> None:
        store.read(layer, expert, into[layer])
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _median_s(read, layers)


def mean_block_bytes(store: Store) -> float:
    """Bytes of one expert, the mean over layers."""
    return float(np.mean([store.block_bytes(n) for n in range(store.num_layers)]))


def _time_host(hosts: Sequence[HostExperts], threads: int, rows: int) -> float:
    """Seconds in which the host computes one expert for so many rows."""
    layers = [host.layer for host in hosts]
    hidden = torch.randn(rows, hidden_size(layers[0]), device="cpu").to(layers[0].pair_dtype)
    place = np.arange(rows)

    def compute(layer: int, expert: int) -> None:
        hosts[layer].threads = threads
        hosts[layer].compute(hidden, place, [expert], [rows])

    with torch.inference_mode():
        return _median_s(compute, layers)


def _median_s(run: Callable[[int, int], None], layers: Sequence[ExpertsLayer]) -> float:
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


def _candidates() -> list[int]:
    """1, 2, 4, ... and torch's own number of threads, which is never exceeded."""
    most = torch.get_num_threads()
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def hidden_size(layer: ExpertsLayer) -> int:
    """Width of what goes into the experts."""
    name = "gate_up_proj" if getattr(layer.module, "has_gate", True) else "up_proj"
    shape = next(t.shape for t in layer.tensors if t.name == name)
    return shape[0] if getattr(layer.module, "is_transposed", False) else shape[1]


def activation_bytes(layer: ExpertsLayer) -> int:
    """Bytes of one token on its way to the host."""
    return hidden_size(layer) * layer.pair_dtype.itemsize


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
