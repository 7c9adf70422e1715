"""
Copy experts from the store into slots, and account for what that took.

On the CPU a copy is done when the call returns, unless read from disk or over an emulated link. On
CUDA copies run on a stream of their own, ordered against the computation by events.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from melinoe.cache.residency import Load
from melinoe.moe.experts import ExpertsLayer
from melinoe.stores.store import Store, empty_block

# A disk gives its rate to about four reads in flight; more gained nothing.
_READERS = 4
_MOST_STAGED = 8
# A smaller block is read sooner than a thread is told to read it.
_WORTH_A_THREAD = 256 * 1024
_WORTH = 0.5  # share of guesses that must be right for them to be made


def staging_blocks(slots: Sequence[int]) -> int:
    """Experts that are read ahead at once, where slots are filled from disk: few beside *slots*."""
    return min(_MOST_STAGED, sum(slots) // 16)


def read_by_threads(layers: Sequence[ExpertsLayer]) -> bool:
    """Whether experts come from disk by `DiskTransfer`; small ones are read by the pass itself."""
    return max(layer.block_bytes for layer in layers) >= _WORTH_A_THREAD


SlotViews = Sequence[Mapping[str, Tensor]]
"""Per slot, per parameter name, a view shaped without the experts' dimension."""


@dataclass
class EmulatedLink:
    """
    Make transfers as slow as a link of given bandwidth and latency, for studies. Each takes at
    least ``latency_s + bytes / bandwidth`` of wall time; they follow one another.
    """

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0
    _free_at: float = field(default=0.0, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.bandwidth_bytes_per_s > 0 or not self.latency_s >= 0:
            raise ValueError(
                "an emulated link needs a bandwidth above 0 and a latency of 0 or more"
            )

    def issue(self, nbytes: int) -> float:
        """Begin one transfer of *nbytes* now; returns the `time.perf_counter` of its arrival."""
        begin = max(time.perf_counter(), self._free_at)
        self._free_at = begin + self.takes_s(nbytes)
        return self._free_at

    def takes_s(self, nbytes: int) -> float:
        """Seconds of one transfer of *nbytes* that queues behind no other."""
        return self.latency_s + nbytes / self.bandwidth_bytes_per_s


class Transfer:
    """
    Copy on the CPU, with or without an emulated link, and keep accounts: *stall_s*, seconds a pass
    waited for experts, prefetches not; *transferred_bytes*; *host_s* and *activation_bytes* of
    misses that the host computed.
    """

    overlaps = False
    """Whether experts arrive one by one while others are computed."""

    def __init__(self, store: Store, link: EmulatedLink | None = None) -> None:
        self.store = store
        self._link = link
        self.reset()

    def reset(self) -> None:
        """Set the accounts to zero."""
        self.stall_s = self.host_s = 0.0
        self.transferred_bytes = self.activation_bytes = 0

    def issue(
        self, layer: int, loads: Sequence[Load], slots: SlotViews, *, stalls: bool = False
    ) -> Any:
        """Begin to copy experts into slots; returns a ticket for `wait`, None if they are there."""
        begin, arrival = time.perf_counter(), None
        nbytes = self.store.block_bytes(layer)
        for load in loads:
            if self._link is not None:
                arrival = self._link.issue(nbytes)
            self.store.read(layer, load.expert, slots[load.slot])
        self.transferred_bytes += nbytes * len(loads)
        if stalls:
            self.stall_s += time.perf_counter() - begin
        return arrival

    def wait(self, ticket: Any) -> None:
        """Let the pass wait for what *ticket* stands for, on the clock of `stall_s`."""
        if ticket is not None:
            begin = time.perf_counter()
            _sleep_until(ticket)
            self.stall_s += time.perf_counter() - begin

    def arrivals(self, ticket: Any) -> Iterator[list[int]]:
        """Yield the experts of *ticket* as they arrive, where the transfer `overlaps`."""
        raise NotImplementedError

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read experts that will probably be asked for, where that can be hidden."""

    def ahead(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Begin to read experts that will be asked for, where that can be hidden."""
        return []

    def forget_ahead(self, layer: int, but: Collection[int]) -> None:
        """Forget what was read ahead for *layer* and is not asked for."""

    def carry_activations(self, nbytes: int) -> None:
        """Count activations on their way; an emulated link carries both ways at once."""
        self.activation_bytes += nbytes
        if self._link is not None:
            _sleep_until(time.perf_counter() + self._link.takes_s(nbytes))

    def adopt(self, slots: Iterable[Tensor]) -> None:
        """Tell whoever manages their memory that copies go to *slots*; nothing to do on the CPU."""

    def finish(self) -> None:
        """Return when no copy is under way: the store and the slots may then go."""


def _sleep_until(when: float) -> None:
    while (left := when - time.perf_counter()) > 0:
        if left > 2e-4:  # sleeping oversleeps by some 60 us; the rest is spent waiting awake
            time.sleep(left - 1e-4)


class DiskTransfer(Transfer):
    """
    Read from disk by a few threads at once: into slots while others are computed from, and ahead.

    Experts that the next layer will probably ask for are read into staging, blocks of no layer,
    never into a slot; a demand that finds its expert there copies it. A wrong guess costs its read,
    so few are made while few are right. *ahead_reads* and *ahead_used* count experts read into
    staging, and those then asked for.
    """

    overlaps = True

    def __init__(self, store: Store, layers: Sequence[ExpertsLayer], staging: int) -> None:
        with torch.inference_mode(False):
            self._free = {
                parts: [empty_block(parts) for _ in range(staging)]
                for parts in {layer.parts for layer in layers}
            }
        self._parts = [layer.parts for layer in layers]
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="melinoe-read")
        # By layer and expert, on its way into staging or there.
        self._staged: dict[tuple[int, int], tuple[Future[None], dict[str, Tensor]]] = {}
        self._forgotten: set[Future[None]] = set()  # reads that nobody asks for any more
        # By layer and slot, the last copy into it: the next one waits for it.
        self._last: dict[tuple[int, int], Future[None]] = {}
        self._guessed: set[tuple[int, int]] = set()
        self._right = 1.0  # share of the guesses, the last twenty or so
        self._refrained = 0
        super().__init__(store)

    def reset(self) -> None:
        """Set the accounts to zero."""
        super().reset()
        self.ahead_reads = self.ahead_used = 0

    def issue(
        self, layer: int, loads: Sequence[Load], slots: SlotViews, *, stalls: bool = False
    ) -> Any:
        """Begin to read; the ticket has for each copy the expert that it brings."""
        ticket: dict[Future[None], int] = {}
        for load in loads:
            staged = self._staged.pop((layer, load.expert), None)
            self.ahead_used += staged is not None
            if (layer, load.expert) in self._guessed:
                self._judge((layer, load.expert), 1.0)
            before = self._last.get((layer, load.slot))
            copy = self._pool.submit(
                self._bring, layer, load.expert, slots[load.slot], staged, before
            )
            self._last[layer, load.slot] = copy
            ticket[copy] = load.expert
        self.transferred_bytes += self.store.block_bytes(layer) * len(loads)
        return ticket

    def wait(self, ticket: Any) -> None:
        """Let the pass wait for all copies of *ticket*."""
        for _ in self.arrivals(ticket):
            pass

    def arrivals(self, ticket: Any) -> Iterator[list[int]]:
        """Yield the experts of *ticket* as they arrive, waiting on the clock of `stall_s`."""
        left = dict(ticket or {})
        while left:
            begin = time.perf_counter()
            done, _ = wait_for(left, return_when=FIRST_COMPLETED)
            self.stall_s += time.perf_counter() - begin
            for copy in done:
                copy.result()
            yield sorted(left.pop(copy) for copy in done)

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Read ahead what *layer* will probably ask for; seldom, if guesses were wrong of late."""
        if self._right < _WORTH:
            self._refrained += 1
            experts = experts[: self._refrained % 16 == 0]
        self._guessed.update((layer, expert) for expert in self.ahead(layer, experts))

    def _judge(self, guess: tuple[int, int], right: float) -> None:
        self._guessed.discard(guess)
        self._right += 0.05 * (right - self._right)

    def ahead(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Read *experts* into staging, as far as it has room; returns those begun now."""
        begun: list[int] = []
        free = self._free[self._parts[layer]]
        for expert in experts:
            if not free:
                break
            if (layer, expert) not in self._staged:
                block = free.pop()
                read = self._pool.submit(self.store.read, layer, expert, block)
                self._staged[layer, expert] = read, block
                self.ahead_reads += 1
                begun.append(expert)
        return begun

    def forget_ahead(self, layer: int, but: Collection[int]) -> None:
        """Make room in staging of what *layer* does not ask for after all."""
        free = self._free[self._parts[layer]]
        for key in [k for k in self._staged if k[0] == layer and k[1] not in but]:
            read, block = self._staged.pop(key)
            self._judge(key, 0.0)
            self.ahead_reads -= read.cancel()
            self._forgotten = {one for one in self._forgotten if not one.done()} | {read}
            read.add_done_callback(lambda _, block=block: free.append(block))  # type: ignore[misc]

    def finish(self) -> None:
        """Return when no read is under way."""
        staged = (read for read, _ in self._staged.values())
        wait_for([*self._last.values(), *self._forgotten, *staged])

    def _bring(
        self,
        layer: int,
        expert: int,
        slot: Mapping[str, Tensor],
        staged: tuple[Future[None], dict[str, Tensor]] | None,
        before: Future[None] | None,
    ) -> None:
        """Fill a slot, in a thread; the copy that was to fill it *before* is over first."""
        if before is not None:
            before.exception()
        if staged is None:
            self.store.read(layer, expert, slot)
            return
        read, block = staged
        try:
            read.result()
            for name, part in block.items():
                slot[name].copy_(part)
        finally:
            self._free[self._parts[layer]].append(block)


class CudaTransfer(Transfer):
    """
    Copy to a CUDA device, on a stream of its own.

    A copy waits for the work the computation has queued, which may still read the slot's former
    expert; the computation waits for the copy by an event, the host for neither. A stall is
    measured between two events around the wait and, on demand, around the issue too.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        super().__init__(store)

    def issue(
        self, layer: int, loads: Sequence[Load], slots: SlotViews, *, stalls: bool = False
    ) -> Any:
        """Begin to copy; the ticket is when the stall began, if it did, and the copy's event."""
        before = self._mark() if stalls else None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for load in loads:
                self.store.read(layer, load.expert, slots[load.slot])
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self.transferred_bytes += self.store.block_bytes(layer) * len(loads)
        return before, arrived

    def wait(self, ticket: Any) -> None:
        """Let the computation's stream, not the host, wait for the copy."""
        if ticket is None:
            return
        before, arrived = ticket
        before = before or self._mark()
        torch.cuda.current_stream(self._device).wait_event(arrived)
        self._waits.append((before, self._mark()))
        if len(self._waits) >= 4096:
            self._measure()

    def adopt(self, slots: Iterable[Tensor]) -> None:
        """The allocator gives the slots' memory to nobody else before their last copy is done."""
        for slot in slots:
            slot.record_stream(self._stream)

    def finish(self) -> None:
        """Wait, on the host, until no copy is under way."""
        self._stream.synchronize()

    @property
    def stall_s(self) -> float:  # type: ignore[override]
        """Seconds the computation's stream waited for copies; reading it synchronises."""
        self._measure()
        return self._measured_s

    @stall_s.setter
    def stall_s(self, value: float) -> None:
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._measured_s = value

    def _mark(self) -> torch.cuda.Event:
        """A time on the computation's stream: when it has done what is queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _measure(self) -> None:
        """Add up the waits recorded so far, and forget their events."""
        if self._waits:
            self._waits[-1][1].synchronize()
            self._measured_s += sum(a.elapsed_time(b) for a, b in self._waits) / 1e3
            self._waits = []
