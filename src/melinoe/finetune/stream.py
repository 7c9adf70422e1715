"""
Train with the frozen experts off the device: each is read from its store when tokens need it.

A pass saves inputs and choices only. The backward pass reads an expert again, computes its rows
again and their gradients, so that an expert that was used is read twice a step, and never kept.
Gradients equal those of the resident model to the bit: an expert's rows are contiguous, and are
multiplied and summed in the same order.

Buffers are filled ahead by threads: in the backward pass by the choices that it will meet, in a
forward pass by what the next layer used the last time. A wrong guess is dropped and never waited
for: guesses have readers of their own, and leave a buffer to what is needed.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from melinoe.experts.format import Part
from melinoe.finetune.parts import LowRank
from melinoe.moe.dispatch import computed_by
from melinoe.moe.experts import ExpertsLayer
from melinoe.moe.grouped import Choices, expert_rows, sort_choices, weighted_sum
from melinoe.stores.store import Store, empty_block

READERS = 4  # reads in flight: a disk gives its rate from about four on
_ALIGNMENT = 64  # bytes; each stack of a buffer begins at a multiple


@dataclass
class Reads:
    """Count what was read."""

    forward: int = 0  # experts, for the passes that used them
    backward: int = 0
    unused: int = 0  # by a wrong guess
    bytes: int = 0  # of all three, as they are stored
    waited_s: float = 0.0  # seconds that computing waited for them

    @property
    def used(self) -> int:
        """Experts read for passes, both ways."""
        return self.forward + self.backward


@dataclass
class _Load:
    """Some experts of one layer on their way into one buffer."""

    layer: int
    experts: list[int]
    guessed: bool
    buffer: int = -1
    jobs: list[Future[Any]] = field(default_factory=list)  # give, on a GPU, when it is copied


@dataclass
class _Pass:
    """One layer's pass that a backward pass will come to: its experts, and the pass before it."""

    layer: int
    experts: list[int]
    before: Callable[[], _Pass | None]
    guessed: bool = False


class ExpertStream:
    """
    Computes the frozen experts of a model in training from a *store*, through a few *buffers*. Each
    holds *chunk* experts: one computes, the rest are read ahead by *readers* at once. *updates_on*:
    where the experts' low-rank updates are kept, absent: on *device*.
    """

    def __init__(
        self,
        store: Store,
        layers: Sequence[ExpertsLayer],
        device: torch.device | str = "cpu",
        *,
        buffers: int = 4,
        chunk: int = 1,
        readers: int = READERS,
        updates_on: torch.device | None = None,
    ) -> None:
        self.store, self.layers, self.device = store, list(layers), torch.device(device)
        self.chunk, self.reads, self.updates_on = chunk, Reads(), updates_on
        # By whether a group is guessed.
        self._readers = [ThreadPoolExecutor(readers, "melinoe-stream") for _ in range(2)]
        size = max(chunk * buffer_bytes(layer) for layer in self.layers)
        self._arenas = [
            torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(buffers)
        ]
        self._free = list(range(buffers))
        self._done: dict[int, Any] = {}  # by buffer, on a GPU: when its last computing ends
        self._queue: deque[_Load] = deque()
        self._running: list[_Load] = []
        self._ending: list[_Load] = []  # no longer wanted; free once no read is under way
        self._used: dict[int, list[int]] = {}  # by layer, in its last pass
        self._last: Callable[[], _Pass | None] = _nothing
        self.kept: _Kept | None = None
        self._places = {id(layer.module): layer for layer in self.layers}
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def close(self) -> None:
        """End the readers; nothing can be read afterwards."""
        self._drop_all()
        for pool in self._readers:
            pool.shutdown()

    def attached(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within it, the experts of *model* that nothing else computes are computed from here."""
        return computed_by(model, [layer.module for layer in self.layers], self.compute)

    def compute(
        self,
        module: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        addition: LowRank | None = None,
    ) -> Tensor:
        """Compute an experts module as `grouped_experts` does, from the store."""
        layer = self._places[id(module)]
        names = [] if addition is None else addition.names
        factors = [] if addition is None else [addition.lora_A[n] for n in names]
        factors += [] if addition is None else [addition.lora_B[n] for n in names]
        kept = self.kept.take() if self.kept is not None else None
        output = _Experts.apply(
            self, layer, addition, kept, hidden_states, top_k_index, top_k_weights, *factors
        )
        if self.kept is not None:
            self.kept.put(output)
        return output  # type: ignore[no-any-return]

    def checkpoint_contexts(self) -> tuple[Any, Any]:
        """Give a checkpointed layer's contexts: experts' outputs are kept."""
        outputs: list[Tensor] = []
        return _Kept(self, outputs, again=False), _Kept(self, outputs, again=True)

    # ---- reading ----

    def run(
        self,
        layer: int,
        used: Sequence[int],
        following: _Pass | None,
        compute: Callable[[list[int], dict[str, Tensor]], None],
        *,
        backward: bool,
    ) -> None:
        """
        Compute a layer's pass over *used* experts group by group, as each is in its buffer.
        *compute* is called with the ids of a group, and their weights by name, ``(chunk, ...)``;
        *following* is what comes after the pass, to be read ahead.
        """
        wanted = set(used)
        due = [one for one in self._running if one.layer == layer and wanted & {*one.experts}]
        for one in [*self._running]:
            if one not in due:
                self._drop(one)
        there = {expert for one in due for expert in one.experts}
        rest = _Pass(layer, [one for one in used if one not in there], _nothing)
        self._queue = deque(self._groups(rest))
        due += self._queue
        if following is not None:
            self._queue += self._groups(following)
        try:
            self._start()
            for one in due:
                self._wait(one, wanted)
                compute(one.experts, self._views(self.layers[layer], one.buffer))
                self._release(one)
                count = len(wanted & {*one.experts})
                self.reads.backward += count if backward else 0
                self.reads.forward += 0 if backward else count
                self.reads.unused += len(one.experts) - count
                self.reads.bytes += len(one.experts) * self.store.block_bytes(layer)
                self._start()
        except BaseException:
            self._drop_all()
            raise

    def _groups(self, one: _Pass) -> list[_Load]:
        return [
            _Load(one.layer, one.experts[at : at + self.chunk], one.guessed)
            for at in range(0, len(one.experts), self.chunk)
        ]

    def _start(self) -> None:
        """Begin to read what is queued, as far as there are buffers."""
        for one in [*self._ending]:
            if all(job.done() for job in one.jobs):
                self._ending.remove(one)
                self._free.append(one.buffer)
        while self._queue and len(self._free) > self._queue[0].guessed:
            one = self._queue.popleft()
            one.buffer = self._free.pop(0)
            views = self._views(self.layers[one.layer], one.buffer)
            after = self._done.pop(one.buffer, None)
            one.jobs = [
                self._readers[one.guessed].submit(
                    self._read, one.layer, expert, {n: v[at] for n, v in views.items()}, after
                )
                for at, expert in enumerate(one.experts)
            ]
            self._running.append(one)

    def _wait(self, one: _Load, wanted: set[int]) -> None:
        """Wait until the *wanted* experts of a group are in its buffer."""
        began = time.perf_counter()
        while one.buffer < 0:  # what was read ahead of a step that failed has every buffer
            reading = [job for other in self._ending for job in other.jobs if not job.done()]
            wait(reading, return_when=FIRST_COMPLETED)
            self._start()
        for expert, job in zip(one.experts, one.jobs, strict=True):
            if expert in wanted and (copied := job.result()) is not None:
                copied.wait(torch.cuda.current_stream(self.device))
        self.reads.waited_s += time.perf_counter() - began

    def _release(self, one: _Load) -> None:
        self._running.remove(one)
        if self._copies is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._done[one.buffer] = event
        self._ending.append(one)

    def _drop(self, one: _Load) -> None:
        """Give up a guess: what is not being read yet never is."""
        self._running.remove(one)
        read = sum(not job.cancel() for job in one.jobs)
        self.reads.unused += read
        self.reads.bytes += read * self.store.block_bytes(one.layer)
        self._ending.append(one)

    def _drop_all(self) -> None:
        self._queue.clear()
        for one in [*self._running]:
            self._drop(one)

    def _read(self, index: int, expert: int, into: dict[str, Tensor], after: Any) -> Any:
        """Read one expert into its place in a buffer, in the module's types. In a thread."""
        with torch.no_grad():
            if self._copies is None:
                self._read_now(index, expert, into)
                return None
            with torch.cuda.stream(self._copies):
                if after is not None:
                    self._copies.wait_event(after)
                self._read_now(index, expert, into)
                return self._copies.record_event()

    def _read_now(self, index: int, expert: int, into: dict[str, Tensor]) -> None:
        layer, stored = self.layers[index], self.store.format(index)
        if stored.exact:
            self.store.read(index, expert, into)
            return
        block = empty_block(stored.parts(layer.tensors))
        self.store.read(index, expert, block)
        block = {name: part.to(self.device) for name, part in block.items()}
        for name, weights in stored.decode(layer.tensors, block).items():
            into[name].copy_(weights)

    def _views(self, layer: ExpertsLayer, buffer: int) -> dict[str, Tensor]:
        """The stacks of a layer's tensors in one buffer, ``(chunk, ...)`` each."""
        views, at = {}, 0
        for tensor in layer.tensors:
            flat = self._arenas[buffer][at : at + self.chunk * tensor.nbytes]
            views[tensor.name] = flat.view(tensor.dtype).view(self.chunk, *tensor.shape)
            at += self.chunk * _aligned(tensor)
        return views

    # ---- what comes next ----

    def guess(self, layer: int) -> _Pass | None:
        """Give the experts that a layer used in its last pass."""
        used = self._used.get(layer)
        return None if used is None else _Pass(layer, used, _nothing, guessed=True)

    def note(self, layer: int, used: list[int], returns: bool) -> _Pass:
        """Note a pass; one that *returns* is known to the backward pass as long as it lives."""
        self._used[layer] = used
        made = _Pass(layer, used, self._last)
        if returns:
            self._last = weakref.ref(made)
        return made

    def step_back(self, one: _Pass) -> _Pass | None:
        """Give what the backward pass comes to after *one*: the pass before, or a new step."""
        self._last = one.before
        return one.before() or self.guess(0)


class _Kept:
    """Keeps the outputs of the experts within a checkpointed layer; or gives them *again*."""

    def __init__(self, stream: ExpertStream, outputs: list[Tensor], again: bool) -> None:
        self._stream, self._outputs, self._again = stream, outputs, again

    def __enter__(self) -> None:
        self._outside, self._stream.kept = self._stream.kept, self
        self._at = 0

    def __exit__(self, *_: object) -> None:
        self._stream.kept = self._outside

    def take(self) -> Tensor | None:
        """The output of the first run, in a later one."""
        if not self._again:
            return None
        self._at += 1
        return self._outputs[self._at - 1].clone()

    def put(self, output: Tensor) -> None:
        """Keep an output of the first run."""
        if not self._again:
            self._outputs.append(output.detach())


class _Experts(torch.autograd.Function):
    """One layer's experts, read from the store in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        stream: ExpertStream,
        layer: ExpertsLayer,
        addition: LowRank | None,
        kept: Tensor | None,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        ctx.stream, ctx.layer, ctx.addition = stream, layer, addition
        ctx.autocast = _autocast(hidden.device.type)
        ctx.save_for_backward(hidden, index, weights, *factors)
        if kept is not None:
            return kept
        choice = sort_choices(index, weights, layer.num_experts)
        used = _used(index, layer.num_experts)
        ctx.back = stream.note(layer.index, used, returns=any(ctx.needs_input_grad))
        sums: list[Tensor] = []
        ends = choice.offsets.tolist()

        def compute(experts: list[int], stacks: dict[str, Tensor]) -> None:
            group = _Group.of(choice, ends, experts, used)
            own = [one[experts].to(hidden.device) for one in factors]
            rows = hidden[choice.tokens[group.pairs]]
            outputs = group.compute(layer, stacks, rows, addition, own)
            weighted = outputs * choice.weights[group.pairs].unsqueeze(-1)
            if not sums:
                sums.append(weighted.new_zeros(len(choice.order), weighted.shape[-1]))
            sums[0][group.pairs] = weighted

        following = stream.guess(layer.index + 1)
        stream.run(layer.index, used, following, compute, backward=False)
        return weighted_sum(sums[0], choice, hidden) if sums else torch.zeros_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, index, weights, *factors = ctx.saved_tensors
        stream, layer, addition = ctx.stream, ctx.layer, ctx.addition
        choice = sort_choices(index, weights, layer.num_experts)
        used, ends = _used(index, layer.num_experts), choice.offsets.tolist()
        to_rows = hidden.new_zeros(len(choice.order), hidden.shape[-1])
        to_weights = torch.zeros_like(choice.weights)
        to_factors = [torch.zeros_like(one) for one in factors]

        def compute(experts: list[int], stacks: dict[str, Tensor]) -> None:
            group = _Group.of(choice, ends, experts, used)
            tokens = choice.tokens[group.pairs]
            with torch.enable_grad(), ctx.autocast():
                rows = hidden[tokens].detach().requires_grad_()
                weight = choice.weights[group.pairs].detach().requires_grad_()
                own = [one[experts].detach().to(rows.device).requires_grad_() for one in factors]
                outputs = group.compute(layer, stacks, rows, addition, own)
                weighted = outputs * weight.unsqueeze(-1)
            wanted = gradients[0][tokens].to(weighted.dtype)
            found = torch.autograd.grad(weighted, [rows, weight, *own], wanted, allow_unused=True)
            to_rows[group.pairs], to_weights[group.pairs] = found[0], found[1]
            for whole, part in zip(to_factors, found[2:], strict=True):
                whole[experts] = part.to(whole.device)

        stream.run(layer.index, used, stream.step_back(ctx.back), compute, backward=True)
        to_hidden = torch.zeros_like(hidden).index_put_((choice.tokens,), to_rows, accumulate=True)
        by_pair = torch.zeros_like(to_weights)
        by_pair[choice.order] = to_weights
        none = (index < 0) | (index >= layer.num_experts)
        by_token = by_pair.view(weights.shape).masked_fill(none, 0)
        return None, None, None, None, to_hidden, None, by_token, *to_factors


class _Group(NamedTuple):
    """The pairs of a group of experts: places among the sorted ones, and whose each is."""

    pairs: Tensor
    local: Tensor  # number of the expert within the group
    offsets: Tensor  # int32, one for each of the group

    @classmethod
    def of(cls, choice: Choices, ends: list[int], experts: list[int], used: list[int]) -> _Group:
        """Find the pairs of *experts*; of those that are not *used* there are none."""
        wanted, device = set(used), choice.order.device
        spans = [(ends[one - 1] if one else 0, ends[one]) for one in experts]
        runs = [
            torch.arange(start, end if one in wanted else start)
            for one, (start, end) in zip(experts, spans, strict=True)
        ]
        counts = torch.tensor([len(run) for run in runs])
        local = torch.repeat_interleave(torch.arange(len(experts)), counts)
        offsets = counts.cumsum(0).to(device, torch.int32)
        return cls(torch.cat(runs).to(device), local.to(device), offsets)

    def compute(
        self,
        layer: ExpertsLayer,
        stacks: dict[str, Tensor],
        rows: Tensor,
        addition: LowRank | None,
        own: list[Tensor],
    ) -> Tensor:
        """Compute the pairs' rows, unweighted; *own* are the group's factors, all A first."""
        stacks = {name: stack[: len(self.offsets)] for name, stack in stacks.items()}
        names = [] if addition is None else addition.names
        half = len(names)
        factors = dict(zip(names, zip(own[:half], own[half:], strict=True), strict=True))

        def add(name: str, rows: Tensor, offsets: Tensor) -> Tensor:
            return addition.term(*factors[name], rows, offsets)  # type: ignore[union-attr]

        given = (layer.module, stacks, rows, self.local, self.offsets)
        return expert_rows(*given, None if addition is None else add)


def _used(index: Tensor, num_experts: int) -> list[int]:
    """List the experts that a token chose."""
    return index[(index >= 0) & (index < num_experts)].unique().tolist()  # type: ignore[no-any-return]


def _autocast(device: str) -> Callable[[], Any]:
    """Remember the autocast of a forward pass, for the rows that are computed again."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(torch.autocast, device, dtype, enabled=enabled)


def buffer_bytes(layer: ExpertsLayer) -> int:
    """Bytes that one expert of *layer* takes in a buffer: unpacked, in the module's types."""
    return sum(map(_aligned, layer.tensors))


def _aligned(tensor: Part) -> int:
    return math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT


def _nothing() -> None:
    return None
