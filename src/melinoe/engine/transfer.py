"""
Copy experts from the store into slots, and account for what that took.

On the CPU a copy is done when the call returns; an emulated link can make it take longer. On CUDA
copies run on a stream of their own, ordered against the computation by events.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from melinoe.cache.residency import Load
from melinoe.errors import AttachError
from melinoe.stores.store import Store

SlotViews = Sequence[Mapping[str, Tensor]]
"""Per slot, per parameter name, a view shaped without the experts' dimension."""


@dataclass
class EmulatedLink:
    """
    Make transfers as slow as a link of given bandwidth and latency, for studies.

    A transfer takes at least ``latency_s + bytes / bandwidth`` of wall time after it was issued,
    and transfers on one link follow one another. A copy that is slower than that by itself counts
    as long as it takes.
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
    Copy on the CPU, with or without an emulated link.

    Attributes:
        store: Where experts come from.
        stall_s: Seconds a forward pass waited for experts: copying included, prefetches not.
        transferred_bytes: Bytes copied into slots, on demand and ahead of it.
        host_s: Seconds in which the host computed missing experts, activations' ways included.
        activation_bytes: Bytes of activations that went to the host for it, and came back.
    """

    def __init__(self, store: Store, link: EmulatedLink | None = None) -> None:
        self.store = store
        self._link = link
        self.reset()

    def reset(self) -> None:
        """Set the accounts to zero."""
        self.stall_s = self.host_s = 0.0
        self.transferred_bytes = self.activation_bytes = 0

    def issue(self, layer: int, loads: Sequence[Load], slots: SlotViews) -> Any:
        """Begin to copy experts into slots; returns a ticket for `wait`, None if they are there."""
        nbytes, arrival = self.store.block_bytes(layer), None
        for load in loads:
            if self._link is not None:
                arrival = self._link.issue(nbytes)
            self.store.read(layer, load.expert, slots[load.slot])
        self.transferred_bytes += nbytes * len(loads)
        return arrival

    def wait(self, ticket: Any) -> None:
        """Return when what *ticket* stands for has arrived."""
        while (left := ticket - time.perf_counter()) > 0:
            if left > 2e-4:  # sleeping oversleeps by some 60 us; the rest is spent waiting awake
                time.sleep(left - 1e-4)

    def begin_demand(self, layer: int, loads: Sequence[Load], slots: SlotViews) -> Any:
        """Begin to copy, on the clock of `stall_s`: the host does something else meanwhile."""
        with self._stalling():
            return self.issue(layer, loads, slots)

    def demand(self, layer: int, loads: Sequence[Load], slots: SlotViews) -> None:
        """Copy the experts of *loads* and wait for them, on the clock of `stall_s`."""
        with self._stalling():
            ticket = self.issue(layer, loads, slots)
            if ticket is not None:
                self.wait(ticket)

    def await_prefetched(self, ticket: Any) -> None:
        """Wait for an earlier prefetch, on the clock of `stall_s`."""
        with self._stalling():
            self.wait(ticket)

    def carry_activations(self, nbytes: int) -> None:
        """
        Count activations on their way to the host or back; over an emulated link, also wait.

        They do not queue behind weights: a link carries both ways at once, and copies so small get
        between large ones.
        """
        self.activation_bytes += nbytes
        if self._link is not None:
            self.wait(time.perf_counter() + self._link.takes_s(nbytes))

    def adopt(self, slots: Iterable[Tensor]) -> None:
        """Tell whoever manages their memory that copies go to *slots*; nothing to do on the CPU."""

    def finish(self) -> None:
        """Return when no copy is under way: the store and the slots may then go."""

    @contextmanager
    def _stalling(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.stall_s += time.perf_counter() - begin


class CudaTransfer(Transfer):
    """
    Copy to a CUDA device, on a stream of its own.

    A copy waits for the work the computation has queued, which may still read the slot's former
    expert; the computation waits for the copy by an event. The host waits for neither. Stalls are
    measured between two events on the computation's stream, around its wait and, on demand, around
    the issue too, which takes the host's time where the store is not pinned.

    Args:
        store: Its blocks should be pinned; copies from pageable memory make the host wait.
        device: Where the slots are.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        super().__init__(store)

    def issue(self, layer: int, loads: Sequence[Load], slots: SlotViews) -> Any:
        """Begin to copy; the ticket is a CUDA event."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for load in loads:
                self.store.read(layer, load.expert, slots[load.slot])
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        self.transferred_bytes += self.store.block_bytes(layer) * len(loads)
        return arrived

    def wait(self, ticket: Any) -> None:
        """Let the computation's stream, not the host, wait for the copy."""
        self._wait_since(self._mark(), ticket)

    def begin_demand(self, layer: int, loads: Sequence[Load], slots: SlotViews) -> Any:
        """Begin to copy; the wait is measured when the ticket is awaited."""
        return self.issue(layer, loads, slots)

    def demand(self, layer: int, loads: Sequence[Load], slots: SlotViews) -> None:
        """Let the computation's stream wait for the copies; the host goes on."""
        before = self._mark()
        self._wait_since(before, self.issue(layer, loads, slots))

    def await_prefetched(self, ticket: Any) -> None:
        """Let the computation's stream wait for an earlier prefetch; the host goes on."""
        self.wait(ticket)

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

    def _wait_since(self, before: torch.cuda.Event, ticket: torch.cuda.Event) -> None:
        """Let the computation's stream wait for *ticket*; its stall counts from *before*."""
        torch.cuda.current_stream(self._device).wait_event(ticket)
        self._waits.append((before, self._mark()))
        if len(self._waits) >= 4096:
            self._measure()

    def _measure(self) -> None:
        """Add up the waits recorded so far, and forget their events."""
        if self._waits:
            self._waits[-1][1].synchronize()
            self._measured_s += sum(a.elapsed_time(b) for a, b in self._waits) / 1e3
            self._waits = []


def check_link(device: torch.device, link: EmulatedLink | None) -> None:
    """
    Refuse what cannot work before anything is moved.

    Raises:
        AttachError: an emulated link on a device with a real one, or an unsupported device.
    """
    if device.type not in ("cpu", "cuda"):
        raise AttachError(f"slots on {device} are not supported; use cpu or cuda")
    if link is not None and device.type != "cpu":
        raise AttachError(
            f"the emulated link works on the CPU only, and the slots are on {device}; "
            "leave the link out to use the real one"
        )


def transfer_for(store: Store, device: torch.device, link: EmulatedLink | None) -> Transfer:
    """The transfer that fits *device*; see `check_link` for what is refused."""
    check_link(device, link)
    return CudaTransfer(store, device) if device.type == "cuda" else Transfer(store, link)
