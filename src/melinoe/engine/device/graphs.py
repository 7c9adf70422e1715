"""
Decode steps as CUDA graphs, inside transformers' own `generate`.

`generate` asks the model for a compiled forward where its cache is static, on a GPU. We answer with
one that captures the forward pass in a CUDA graph and replays it: the first step of a kind runs as
it is, the second is captured, and from then on a step is one launch. A kind whose steps wait for
the device is never captured. What cannot be captured runs step by step, after one loud warning that
says why. Where compiling was asked for, the second step
of a kind is compiled and the third is captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import Cache

from melinoe.engine.device import cache_state, plug
from melinoe.engine.device.captured import CudaStep, PlainStep, Step
from melinoe.engine.device.compiled import CompiledForward, CompileError, cause, first_line
from melinoe.engine.device.constants import Constants
from melinoe.engine.device.fingerprint import fingerprint
from melinoe.engine.device.graph_inputs import buffer, fill
from melinoe.engine.device.kept_cache import KeptCache
from melinoe.engine.device.passes import DEVICE, PLANS, FastPasses
from melinoe.engine.device.step_kind import StepKinds
from melinoe.engine.device.waits import waits
from melinoe.engine.passes import Batch

_log = logging.getLogger("melinoe")

Forward = Callable[[Mapping[str, Any]], Any]
Counts = list[list[int | None]]

# Kinds of step (batch size, cache length) that are kept; each holds its own buffers.
_MOST_KINDS = 16
# Kinds that are remembered to have run once, or to need the host.
_MOST_KNOWN = 64
# Captures that may run out of memory before none is tried any more.
_TRIES = 3
# Steps of a kind that may wait for the device, as a first one does, before it is never captured.
_WAITS = 3


class DecodeGraphs:
    """
    The captured decode steps of one model.

    Args:
        model: a transformers model.
        passes: of its runtime.
        device: where it is.
        enabled: whether `generate` is to use them.
        compiled: the compiled forward pass that is captured; None: the model's own.

    Attributes:
        captured: steps captured so far.
        replayed: steps replayed so far.
        reason: why steps are not captured any more; None while they are.
    """

    def __init__(
        self,
        model: nn.Module,
        passes: FastPasses,
        device: torch.device,
        enabled: bool,
        compiled: CompiledForward | None = None,
    ) -> None:
        self._model: Any = model
        self._passes, self._device = passes, device
        self._enabled = enabled
        self.compiled = compiled
        self._make: Callable[[Callable[[], Any], Any, Any], Step]
        self._make = CudaStep if device.type == "cuda" else PlainStep
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._steps: dict[tuple, tuple[dict[str, Any], Step]] = {}
        # Kinds of which one step has run as it is, and kinds that only the host can plan.
        self._warm: dict[tuple, None] = {}
        self._hosted: dict[tuple, None] = {}
        self._waited: dict[tuple, int] = {}
        self._stepping = False
        self._not_static: str | None = None
        self._warned: set[str] = set()
        self._fingerprint: int | None = None
        self._no_room = 0
        self._pool: Any = None
        # Buffers on which steps of a kind have been compiled, and which the captured step reads;
        # and what the cache counted then.
        self._compiled: dict[tuple, tuple[dict[str, Any], Counts]] = {}
        self._caches: dict[str, StaticCache] = {}
        self._kinds = StepKinds(device, self._warn)
        self._constants = Constants()
        self._kept = KeptCache(renewed=self._drop)
        self._paused = 0
        self.captured = self.replayed = 0
        self.reason: str | None = None

    def plug_in(self) -> Callable[[], None]:
        """Answer `generate` when it asks for a compiled forward; returns what undoes it."""
        if not self._enabled:
            return plug.forbid_compiling(self._model)
        self._passes.unasked = self._unasked
        self._passes.generation_begins = self.look_at_model
        generates = getattr(self._model, "generation_config", None) is not None
        on_gpu = self._device.type == "cuda" and generates
        if on_gpu:
            self._not_static = plug.why_not_static(type(self._model), self._model.config)
            if self._not_static is not None:
                self._warn(self._not_static)
        return plug.answer(
            self._model, self.step, lambda given: self._kept.reusing(given, lambda: self._compiles),
            static=on_gpu and self._not_static is None,
        )  # fmt: skip

    def _unasked(self, batched: bool) -> None:
        if batched:
            self._warn("in continuous batching its attention has no block tables")
        elif not (self._stepping or self._paused or self.reason or self._not_static):
            self._warn("nobody asks for these, as with beams, or in a loop of one's own")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In the body every step runs as it is, so that hooks and recorders see it."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def forget(self) -> None:
        """Free the graphs, their buffers and the kept cache."""
        self._drop()
        self._kept.forget()

    def step(self, **inputs: Any) -> Any:
        """One forward pass of the model with these arguments, replayed if it can be."""
        # Held while a step runs and no longer, so that it is known when nobody else holds them.
        self._caches = {name: one for name, one in inputs.items() if isinstance(one, StaticCache)}
        self._stepping = True
        try:
            as_it_is = self._paused or self.reason or self._passes.in_prompt(inputs)
            key = None if as_it_is else self._kinds.of(inputs)
            return self._model(**inputs) if key is None else self._step(key, inputs)
        finally:
            self._stepping, self._caches = False, {}

    def _step(self, key: tuple, inputs: Mapping[str, Any]) -> Any:
        """A step of a kind that can be captured, or that has not shown yet that it cannot."""
        if key not in self._steps and key not in self._warm:
            return self._as_it_is(key, inputs)
        if key not in self._steps and self._compiles and key not in self._compiled:
            output = self._first_compiled(key, inputs)
            if output is not None:
                return output
        counts = self._counts()
        self._passes.completion_begins()  # no hook says so, and it may ask the device
        if key not in self._steps and not self._capture(key, inputs):
            return self._model(**inputs)
        buffers, step = self._steps[key]
        fill(buffers, inputs)
        step.replay()
        self._set_counts(counts, 1)
        self.replayed += 1
        return self._joined(step.output)

    def _as_it_is(self, key: tuple, inputs: Mapping[str, Any]) -> Any:
        """The first step of a kind, which also compiles the kernels."""
        if key in self._hosted:
            return self._model(**inputs)
        before = self._kinds.caches(inputs)
        with self._constants.learning(), waits(self._device) as waited:
            output = self._model(**inputs)
        if waited:
            self._note_wait(key, waited[0])
            return output
        known = {DEVICE: self._warm, PLANS: self._hosted}.get(self._passes.mode)
        if self._kinds.is_steady(before, self._kinds.caches(inputs)) and known is not None:
            if len(known) >= _MOST_KNOWN:
                known.pop(next(iter(known)))
            known[key] = None
        return output

    def _note_wait(self, key: tuple, where: str) -> None:
        """Count a step of a kind that waited for the device; after some it is never captured."""
        self._waited[key] = self._waited.get(key, 0) + 1
        if self._waited[key] == _WAITS:
            self._hosted[key] = None
            self._warn(f"they wait for the device, at {where}")

    @property
    def _compiles(self) -> bool:
        return self.compiled is not None and self.compiled.reason is None

    def _first_compiled(self, key: tuple, inputs: Mapping[str, Any]) -> Any | None:
        """The step compiled, on the buffers it will be captured with; None if that fails."""
        assert self.compiled is not None
        buffers, counts = self._compiled[key] = self._buffers_for(inputs), self._counts()
        try:
            return self._joined(self._run(self.compiled.first, buffers))
        except CompileError:
            self._set_counts(counts)
            return None
        finally:
            if not self._compiles:
                self._compiled = {}

    def _capture(self, key: tuple, inputs: Mapping[str, Any]) -> bool:
        """Capture one kind of step; False if that does not work, which is said."""
        counts = self._counts()
        known = self._compiled.pop(key, None)
        buffers, compiled_at = known or (self._buffers_for(inputs), counts)
        # The oldest goes first, and before the new one takes memory.
        if len(self._steps) >= _MOST_KINDS:
            self._steps.pop(next(iter(self._steps)))
        if self._compiles:
            assert self.compiled is not None
            try:
                self._steps[key] = self._made(self.compiled.again, buffers, compiled_at)
            except Exception as error:  # nothing was computed: the model's own may be captured
                self.compiled.give_up(cause(error))
                self._passes.settle()
                self._pool = self._pool if self._steps else None
        if key not in self._steps:
            try:
                self._steps[key] = self._made(self._own, buffers, counts)
            except Exception as error:  # whatever a kernel or the driver objects to
                self._set_counts(counts)
                self._failed(cause(error))
                return False
        self.captured += 1
        return True

    def _counts(self) -> Counts:
        return list(map(cache_state.counts, self._caches.values()))

    def _set_counts(self, counts: Counts, more: int = 0) -> None:
        for cache, values in zip(self._caches.values(), counts, strict=True):
            cache_state.set_counts(cache, values, more)

    def _made(
        self, forward: Forward, buffers: dict[str, Any], counts: Counts
    ) -> tuple[dict[str, Any], Step]:
        """The captured step; *counts* are those that *forward* was compiled for, or today's."""

        def run() -> Any:
            self._set_counts(counts)
            return self._run(forward, buffers)

        if self._pool is None and self._stream is not None:
            self._pool = torch.cuda.graph_pool_handle()
        return buffers, self._make(run, self._pool, self._stream)

    def _own(self, inputs: Mapping[str, Any]) -> Any:
        with self._constants.giving():
            return self._model(**inputs)

    def _buffers_for(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: buffer(value) for name, value in inputs.items() if name not in self._caches}

    def _run(self, forward: Forward, buffers: dict[str, Any]) -> Any:
        """The pass on *buffers*; its output without the cache, which a graph must not hold."""
        batch, length = buffers["input_ids"].shape
        # Whether something came before is known here; asking the cache would wait for it.
        self._passes.given = Batch(batch, length, 1, 0, None)
        try:
            with ExitStack() as body:
                for cache in self._caches.values():
                    body.enter_context(cache_state.uncounted(cache))
                output = forward({**buffers, **self._caches})
            return type(output)(
                **{name: one for name, one in output.items() if not isinstance(one, Cache)}
            )
        finally:
            self._passes.given = None

    def _joined(self, output: Any) -> Any:
        """What the caller expects: the output with its cache."""
        return type(output)(**{**output, **self._caches})

    def _drop(self) -> None:
        self._steps, self._compiled = {}, {}
        self._warm, self._hosted, self._waited = {}, {}, {}
        self._pool = None

    def look_at_model(self) -> None:
        """Before a generation: steps captured of a model that has changed since are of no use."""
        now = self._fingerprint if self._paused else fingerprint(self._model)
        if now != self._fingerprint:
            self._fingerprint, self.reason = now, None  # what was in the way may be gone
            self._drop()

    def _failed(self, error: BaseException) -> None:
        """A step cannot be captured: no more are tried, but for want of memory a few times."""
        reason = f"capturing a step failed: {first_line(error)}"
        no_room = isinstance(error, torch.OutOfMemoryError)
        self._no_room += no_room
        if not no_room or self._no_room == _TRIES:
            self.reason = reason
        self._drop()
        self._passes.settle()
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning(
                "decode steps are launched one kernel at a time, not as CUDA graphs: %s", reason
            )
