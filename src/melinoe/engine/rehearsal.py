"""
Time the parts of a miss, each by itself, in a model whose experts are all resident.

What a miss costs beside its transfer cannot be timed alone: a call in a tight loop finds its code
and data in the processor's caches, a call in a forward pass does not. So the model generates as
always, and one part of a miss is acted out in each layer of each decoding pass: a copy, a request
in parts, an expert on the host, a wait. The outputs stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from melinoe.cache.counters import COMPLETION
from melinoe.cache.residency import Decision, Load, Residency
from melinoe.cache.timing import Machine
from melinoe.engine.handle import Handle
from melinoe.engine.misses import HostExperts, hidden_size
from melinoe.engine.reference import ExpertCache, ReferenceEngine

PLAIN, ONE_PART, PARTS, LOADS, HOST_ONE, HOST_MOST, HOST_ALL = (
    "plain", "one part", "parts", "loads", "one on the host", "all but one", "all on the host",
)  # fmt: skip
_ON_THE_HOST = (HOST_ONE, HOST_MOST, HOST_ALL)


@dataclass(frozen=True)
class Wait:
    """
    Wait before each layer's experts, or *in_parts*, before each expert of `PARTS`.

    What follows is slower the longer the wait was, up to a point.
    """

    seconds: float
    in_parts: bool = False

    def __str__(self) -> str:
        return f"wait {1e3 * self.seconds:g} ms" + (", in parts" if self.in_parts else "")


Motion = str | Wait
WAITS = tuple(Wait(seconds, parts) for parts in (False, True) for seconds in (3e-4, 1e-3, 3e-3))
MOTIONS: tuple[Motion, ...] = (PLAIN, ONE_PART, PARTS, LOADS, *_ON_THE_HOST, *WAITS)


class _Resident:
    """A residency in which every expert is resident, and that acts a part of a miss out."""

    def __init__(self, motion: str, cache: ExpertCache, decodes: Callable[[], bool]) -> None:
        self._motion, self._decodes = motion, decodes
        self._slot_of, self.expert_of = cache.residency.slot_of, cache.residency.expert_of
        experts = cache.layer.num_experts
        # Decides as a cache of a quarter of the experts would, at the cost of deciding.
        self._shadow = Residency(experts, max(1, experts // 4))

    def request(self, experts: list[int], *_: Any) -> Decision:
        if self._motion != LOADS or not self._decodes() or len(experts) > self._shadow.capacity:
            return Decision(tuple(experts), ())
        plan = self._shadow.request(experts)
        loads = [Load(one.expert, int(self._slot_of[one.expert]), None) for one in plan.loads]
        return Decision(plan.hits, tuple(loads))

    def request_in_parts(self, experts: list[int], *_: Any) -> list[Decision]:
        if self._motion != PARTS or not self._decodes():
            return [Decision(tuple(experts), ())]
        return [Decision((expert,), ()) for expert in experts]

    def request_with_host(
        self, experts: list[int], *_: Any, **__: Any
    ) -> tuple[Decision, tuple[int, ...]]:
        count = {HOST_ONE: 1, HOST_MOST: len(experts) - 1}.get(self._motion, len(experts))
        on_host = count if self._decodes() else 0
        return Decision(tuple(experts[on_host:]), ()), tuple(experts[:on_host])

    def forget_prefetches(self, **_: Any) -> None:
        """Nobody counts what is used here."""


class Rehearsal:
    """
    A served model that can be told which part of a miss to act out.

    Args:
        handle: Of the reference engine on the CPU, with a slot for every expert; they are filled.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._engine = cast(ReferenceEngine, handle.engine)
        self._caches = self._engine.experts
        self._hosts = [
            HostExperts(
                cache.layer, handle.store, handle.misses.threads, cache._device,
                self._engine.transfer, cache._forward,
            )
            for cache in self._caches
        ]  # fmt: skip
        handle.prefetch([range(layer.num_experts) for layer in handle.layers])

    @contextmanager
    def doing(self, motion: Motion) -> Iterator[None]:
        """Add *motion* to each decoding pass in the body of the ``with`` statement."""
        name = (PARTS if motion.in_parts else PLAIN) if isinstance(motion, Wait) else motion
        with ExitStack() as undo:
            _swap(undo, self._engine.transfer, "_link", None)
            for cache, host in zip(self._caches, self._hosts, strict=True):
                if isinstance(motion, Wait):
                    act = "_add_from_slots" if motion.in_parts else "_compute"
                    _swap(undo, cache, act, self._after(motion.seconds, getattr(cache, act)))
                if name != PLAIN:
                    _swap(undo, cache, "residency", _Resident(name, cache, self._decodes))
                if name in (ONE_PART, PARTS):
                    _swap(undo, cache, "_num_slots", 0)
                elif name in _ON_THE_HOST:
                    _swap(undo, cache, "_host", host)
                    _swap(undo, cache, "_rule", len)
            yield

    def _decodes(self) -> bool:
        return self._handle._passes.phase == COMPLETION

    def _after(self, seconds: float, compute: Callable[..., Any]) -> Callable[..., Any]:
        def waited(*arguments: Any) -> Any:
            if self._decodes():
                self._engine.transfer.wait(time.perf_counter() + seconds)
            return compute(*arguments)

        return waited


def figures_from(
    seconds: Mapping[Motion, float], handle: Handle, loads: float, direct: tuple[float, float]
) -> Machine:
    """
    The engine's own figures, from how long a decoding pass took with each motion.

    Args:
        seconds: Of a pass, by motion.
        handle: Of the model.
        loads: Of a pass, all layers, in the motion `LOADS`.
        direct: From `time_calls`: seconds of a call on one expert, and on a token's.

    Returns:
        A machine without a link, which is the caller's to add.
    """
    layers, plain = len(handle.layers), seconds[PLAIN]
    chosen = _chosen(handle)
    more = {motion: (value - plain) / layers for motion, value in seconds.items()}
    each = max(direct[1] - direct[0], 0.0) / max(chosen - 1, 1)
    parts_s = max(more[ONE_PART], 0.0)
    # Of e experts on the host: parts + o + e (u - each), of all of them also minus the call.
    dearer = more[HOST_ONE] - parts_s  # o + (u - each), with o = 0 where two points are one
    if chosen > 2:
        dearer = (more[HOST_MOST] - more[HOST_ONE]) / (chosen - 2)
    host_s = max(dearer + each, 1e-9)
    once_s = max(more[HOST_ONE] - parts_s - (host_s - each), 0.0)
    call_s = max(parts_s + once_s + chosen * (host_s - each) - more[HOST_ALL], 0.0)
    size = float(np.mean([layer.block_bytes for layer in handle.layers]))
    return Machine(
        link_bytes_per_s=1e15,
        copy_s=max(seconds[LOADS] - plain, 0.0) / loads,
        dram_bytes_per_s=size / host_s,
        host_call_s=once_s,
        pass_s=plain,
        experts_share=min(1.0, layers * (call_s + chosen * each) / plain),
        call_s=call_s,
        parts_s=parts_s,
        part_s=max(more[PARTS] - more[ONE_PART], 0.0) / max(chosen - 1, 1),
        after_wait_s=_after_waits(more, 0.0, 1, in_parts=False),
        part_after_wait_s=_after_waits(more, more[PARTS], chosen, in_parts=True),
    )


def _after_waits(
    more: Mapping[Motion, float], without: float, times: int, *, in_parts: bool
) -> tuple[tuple[float, float], ...]:
    """Seconds more than *without* waits, by seconds of each of so many waits in a layer."""
    curve = [
        (motion.seconds, max((taken - without) / times - motion.seconds, 0.0))
        for motion, taken in more.items()
        if isinstance(motion, Wait) and motion.in_parts == in_parts
    ]
    return _rising(sorted(curve))


def _rising(curve: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The nearest curve that never falls, in squares: what falls is noise, and is pooled."""
    pools: list[list[float]] = []
    for _, value in curve:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [float(np.mean(pool)) for pool in pools for _ in pool]
    return tuple((wait, value) for (wait, _), value in zip(curve, level, strict=True))


def over(machine: Machine, handle: Handle) -> Machine:
    """*machine* with the link of *handle*, if it has one."""
    link = handle.link
    if link is None:
        return machine
    return replace(
        machine, link_bytes_per_s=link.bandwidth_bytes_per_s, link_latency_s=link.latency_s
    )


def time_calls(handle: Handle, repeats: int = 60) -> tuple[float, float]:
    """Median seconds of transformers' function on one expert, and on as many as a token chooses."""
    rng, caches = np.random.default_rng(0), handle.engine.experts
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(repeats):
            cache: Any = caches[int(rng.integers(len(caches)))]
            hidden = torch.zeros(1, hidden_size(cache.layer), dtype=cache._dtype, device="cpu")
            for times, count in zip(taken, (1, _chosen(handle)), strict=True):
                index = torch.from_numpy(rng.permutation(cache.layer.num_experts)[None, :count])
                weights = hidden.new_ones((1, count))
                begin = time.perf_counter()
                cache._forward(cache._stand_in, hidden, index, weights)
                times.append(time.perf_counter() - begin)
    return float(np.median(taken[0])), float(np.median(taken[1]))


def _swap(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until *undo* is closed."""
    own = vars(owner)
    if name in own:
        undo.callback(setattr, owner, name, own[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def _chosen(handle: Handle) -> int:
    """Experts that a token chooses in a layer, from what was counted while decoding."""
    counted = handle.counters
    requests = int(counted.requests[COMPLETION].sum())
    uses = int(counted.uses[COMPLETION].sum())
    tokens = int(counted.tokens[COMPLETION])
    return max(1, round(uses / max(tokens * len(handle.layers), requests, 1)))
