"""
Train with the frozen experts off the device: each is read from its store when tokens need it.

A pass saves inputs and choices only. The backward pass reads an expert again, computes its rows
again and their gradients, so that an expert that was used is read twice a step, and never kept.
Gradients equal those of the resident model to the bit: an expert's rows are contiguous, and are
multiplied and summed in the same order.

Buffers are filled ahead by threads: in the backward pass by the choices that it will meet, in a
forward pass by what the next layer used the last time. A wrong guess is dropped, not waited for.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from melinoe.experts.format import Part
from melinoe.finetune.parts import LowRank
from melinoe.moe.dispatch import bind, bound, unbind, use_melinoe
from melinoe.moe.experts import ExpertsLayer
from melinoe.moe.grouped import Choices, expert_rows, sort_choices, weighted_sum
from melinoe.stores.store import Store, empty_block

READERS = 4  # reads in flight: a disk gives its rate from about four on
_ALIGNMENT = 64  # bytes; each stack of a buffer begins at a multiple


@dataclass
class Reads:
    """
    Count what was read.

    Attributes:
        forward, backward: Experts read for the passes that used them.
        unused: Experts read by a wrong guess.
        bytes: Of all three, as they are stored.
        waited_s: Seconds that computing waited for them.
    """

    forward: int = 0
    backward: int = 0
    unused: int = 0
    bytes: int = 0
    waited_s: float = 0.0

    @property
    def used(self) -> int:
        """Experts read for passes, both ways."""
        return self.forward + self.backward


@dataclass
class _Load:
    """Some experts of one layer on their way into one buffer."""

    layer: int
    experts: list[int]
    buffer: int = -1
    jobs: list[Future[Any]] = field(default_factory=list)  # give, on a GPU, when it is copied


@dataclass
class _Pass:
    """One layer's pass that a backward pass will come to: its experts, and the pass before it."""

    layer: int
    experts: list[int]
    before: Callable[[], _Pass | None]


class ExpertStream:
    """
    Computes the frozen experts of a model in training from a store, through a few buffers.

    Args:
        store: Holds every expert, in any format.
        layers: As the store's, with the modules of the model in training.
        device: Where experts are computed.
        buffers: Groups of experts that are held at once: one that computes, the rest read ahead.
        chunk: Experts of a group.
        readers: Reads in flight.
        updates_on: Where the experts' low-rank updates and their optimiser are kept; absent: on
            *device*. Those of a group go to the device with it.

    Attributes:
        reads: What was read since it was last set.
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
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="melinoe-stream")
        size = max(chunk * buffer_bytes(layer) for layer in self.layers)
        self._arenas = [
            torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(buffers)
        ]
        self._free = list(range(buffers))
        self._done: dict[int, Any] = {}  # by buffer, on a GPU: when its last computing ends
        self._queue: deque[_Load] = deque()
        self._running: list[_Load] = []
        self._dropped: list[_Load] = []
        self._used: dict[int, list[int]] = {}  # by layer, in its last pass
        self._last: Callable[[], _Pass | None] = _nothing
        self.kept: _Kept | None = None
        self._places = {id(layer.module): layer for layer in self.layers}
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def close(self) -> None:
        """End the readers; nothing can be read afterwards."""
        self._drop_all()
        self._pool.shutdown()

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Within it, the experts of *model* that nothing else computes are computed from here."""
        ours = [layer.module for layer in self.layers if bound(layer.module) is None]
        for module in ours:
            bind(module, partial(self.compute, module))
        restore = use_melinoe(model)
        try:
            yield
        finally:
            restore()
            for module in ours:
                unbind(module)

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
        """
        Give the two contexts of one checkpointed layer, for torch's ``context_fn``.

        The first keeps the output of each experts module; in the recomputation it comes back, and
        no expert is read for it.
        """
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
        Compute a pass group by group, as each is in its buffer.

        Args:
            layer: Of the pass.
            used: Its experts.
            following: What comes after it, to be read ahead.
            compute: Called with the ids of a group, and their weights by name, ``(chunk, ...)``.
            backward: For which count.
        """
        wanted = set(used)
        due = [one for one in self._running if one.layer == layer and wanted & {*one.experts}]
        for one in [*self._running]:
            if one not in due:
                self._drop(one)
        there = {expert for one in due for expert in one.experts}
        self._queue = deque(self._groups(layer, [one for one in used if one not in there]))
        due += self._queue
        if following is not None:
            self._queue += self._groups(following.layer, following.experts)
        try:
            self._start()
            for one in due:
                self._wait(one)
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

    def _groups(self, layer: int, experts: Sequence[int]) -> list[_Load]:
        step = self.chunk
        return [_Load(layer, list(experts[i : i + step])) for i in range(0, len(experts), step)]

    def _start(self) -> None:
        """Begin to read what is queued, as far as there are buffers."""
        for one in [*self._dropped]:
            if all(job.done() for job in one.jobs):
                self._dropped.remove(one)
                self._free.append(one.buffer)
        while self._free and self._queue:
            one = self._queue.popleft()
            one.buffer = self._free.pop(0)
            views = self._views(self.layers[one.layer], one.buffer)
            after = self._done.pop(one.buffer, None)
            one.jobs = [
                self._pool.submit(
                    self._read, one.layer, expert, {n: v[at] for n, v in views.items()}, after
                )
                for at, expert in enumerate(one.experts)
            ]
            self._running.append(one)

    def _wait(self, one: _Load) -> None:
        """Wait until a group is in its buffer."""
        began = time.perf_counter()
        while one.buffer < 0:  # a wrong guess that is being read still has the buffer
            for job in [job for other in self._dropped for job in other.jobs]:
                if not job.cancelled():
                    job.exception()
            self._start()
        for job in one.jobs:
            if (copied := job.result()) is not None:
                copied.wait(torch.cuda.current_stream(self.device))
        self.reads.waited_s += time.perf_counter() - began

    def _release(self, one: _Load) -> None:
        self._running.remove(one)
        if self._copies is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self._done[one.buffer] = event
        self._free.append(one.buffer)

    def _drop(self, one: _Load) -> None:
        """Give up a guess: what is not being read yet never is."""
        self._running.remove(one)
        read = sum(not job.cancel() for job in one.jobs)
        self.reads.unused += read
        self.reads.bytes += read * self.store.block_bytes(one.layer)
        self._dropped.append(one)

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
        return None if used is None else _Pass(layer, used, _nothing)

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
        choice, used, ends = _sorted(index, weights, layer.num_experts)
        ctx.back = stream.note(layer.index, used, returns=any(ctx.needs_input_grad))
        sums: list[Tensor] = []

        def compute(experts: list[int], stacks: dict[str, Tensor]) -> None:
            some = _Some(layer, choice, ends, experts, used)
            outputs = some.rows(stacks, hidden[some.tokens], addition, factors)
            weighted = outputs * choice.weights[some.pairs].unsqueeze(-1)
            if not sums:
                sums.append(weighted.new_zeros(len(choice.order), weighted.shape[-1]))
            sums[0][some.pairs] = weighted

        following = stream.guess(layer.index + 1)
        stream.run(layer.index, used, following, compute, backward=False)
        if not sums:
            return torch.zeros_like(hidden)
        return weighted_sum(sums[0], choice, hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        hidden, index, weights, *factors = ctx.saved_tensors
        stream, layer, addition = ctx.stream, ctx.layer, ctx.addition
        choice, used, ends = _sorted(index, weights, layer.num_experts)
        to_rows = hidden.new_zeros(len(choice.order), hidden.shape[-1])
        to_weights = torch.zeros_like(choice.weights)
        to_factors = [torch.zeros_like(one) for one in factors]

        def compute(experts: list[int], stacks: dict[str, Tensor]) -> None:
            some = _Some(layer, choice, ends, experts, used)
            with torch.enable_grad(), ctx.autocast():
                rows = hidden[some.tokens].detach().requires_grad_()
                weight = choice.weights[some.pairs].detach().requires_grad_()
                slices = [one[experts].detach().to(rows.device).requires_grad_() for one in factors]
                outputs = some.rows(stacks, rows, addition, slices, sliced=True)
                weighted = outputs * weight.unsqueeze(-1)
            wanted = gradients[0][some.tokens].to(weighted.dtype)
            found = torch.autograd.grad(
                weighted, [rows, weight, *slices], wanted, allow_unused=True
            )
            to_rows[some.pairs], to_weights[some.pairs] = found[0], found[1]
            for whole, part in zip(to_factors, found[2:], strict=True):
                whole[experts] = part.to(whole.device)

        following = stream.step_back(ctx.back)
        stream.run(layer.index, used, following, compute, backward=True)
        to_hidden = torch.zeros_like(hidden).index_put_((choice.tokens,), to_rows, accumulate=True)
        by_pair = torch.zeros_like(to_weights)
        by_pair[choice.order] = to_weights
        none = (index < 0) | (index >= layer.num_experts)
        by_token = by_pair.view(weights.shape).masked_fill(none, 0)
        return None, None, None, None, to_hidden, None, by_token, *to_factors


class _Some:
    """
    The pairs of a group of experts.

    Attributes:
        pairs: int64, their places among the sorted pairs.
        tokens: int64, of each pair.
    """

    def __init__(
        self,
        layer: ExpertsLayer,
        choice: Choices,
        ends: Sequence[int],
        experts: Sequence[int],
        used: Sequence[int],
    ) -> None:
        self._layer, self._experts = layer, experts
        device, wanted = choice.order.device, set(used)
        starts = [ends[one - 1] if one else 0 for one in experts]
        counts = [
            ends[one] - start if one in wanted else 0
            for one, start in zip(experts, starts, strict=True)
        ]
        runs = [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
        self.pairs = torch.cat(runs).to(device)
        self.tokens = choice.tokens[self.pairs]
        local = torch.repeat_interleave(torch.arange(len(experts)), torch.tensor(counts))
        self._local = local.to(device)
        self._offsets = torch.tensor(counts).cumsum(0).to(device, torch.int32)

    def rows(
        self,
        stacks: dict[str, Tensor],
        rows: Tensor,
        addition: LowRank | None,
        factors: Sequence[Tensor],
        sliced: bool = False,
    ) -> Tensor:
        """Compute the pairs' rows, unweighted; *factors* are of all experts, or only of these."""
        stacks = {name: stack[: len(self._experts)] for name, stack in stacks.items()}
        names = [] if addition is None else addition.names
        own = [one if sliced else one[self._experts].to(rows.device) for one in factors]
        pairs = dict(
            zip(names, zip(own[: len(names)], own[len(names) :], strict=True), strict=True)
        )

        def add(name: str, rows: Tensor, offsets: Tensor) -> Tensor:
            return addition.term(*pairs[name], rows, offsets)  # type: ignore[union-attr]

        return expert_rows(
            self._layer.module,
            stacks,
            rows,
            self._local,
            self._offsets,
            None if addition is None else add,
        )


def _sorted(
    index: Tensor, weights: Tensor, num_experts: int
) -> tuple[Choices, list[int], list[int]]:
    """Sort the choices; return also the experts that a token chose, and where each one's end."""
    choice = sort_choices(index, weights, num_experts)
    real = index[(index >= 0) & (index < num_experts)]
    return choice, real.unique().tolist(), choice.offsets.tolist()


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
