"""
Decode steps as CUDA graphs, inside transformers' own `generate`.

`generate` asks the model for a compiled forward where its cache is static, on a GPU, and gets
`DecodeGraphs.step`: the first step of a kind runs as it is, the second is captured, and from then
on a step is one launch. Steps of a kind agree in the shapes of their inputs, in the cache and in
PyTorch's modes. What cannot be captured runs step by step, after one warning that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import Cache

from melinoe.engine.device import static_cache
from melinoe.engine.device.capture import (
    Constants,
    CudaStep,
    buffer,
    cause,
    fill,
    first_line,
    signature,
    waits,
)
from melinoe.engine.device.passes import DEVICE, PARTS, DevicePasses
from melinoe.engine.passes import Batch

_log = logging.getLogger("melinoe")

Counts = list[list[int | None]]

# Kinds of step (batch size, cache length) that are captured at once, and that are known at all.
_MOST_KINDS, _MOST_KNOWN = 16, 64
# Captures that may run out of memory before none is tried any more.
_TRIES = 3
# Steps of a kind that may wait for the device, as a first one does, before it is never captured.
_WAITS = 3
# Outputs that the next replay would overwrite while the caller keeps them.
_KEPT = ("output_attentions", "output_hidden_states")
# What `plug_in` changes: of the model's generation config, and of the model.
_SETTINGS = ("disable_compile", "cache_implementation")
_METHODS = ("get_compiled_call", "_prepare_static_cache")


@dataclass
class Kind:
    """How far one kind of step is on its way to a CUDA graph."""

    ran: bool = False  # as it is, and can be captured
    never: bool = False  # because the host decides such steps, or they wait for the device
    waited: int = 0  # steps that did
    buffers: dict[str, Any] | None = None  # inputs that the captured step reads
    captured: CudaStep | None = None


class DecodeGraphs:
    """The captured decode steps of one model, and the *reason* why none is captured any more."""

    def __init__(
        self, model: nn.Module, passes: DevicePasses, device: torch.device, enabled: bool
    ) -> None:
        self._model: Any = model
        self._passes, self._device, self._enabled = passes, device, enabled
        self.captured = self.replayed = 0
        self.reason: str | None = None
        self._make: Callable[[Callable[[], Any], Any, Any], CudaStep] = CudaStep
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool: Any = None
        self._kinds: dict[tuple, Kind] = {}
        self._cache_kinds = static_cache.CacheKinds()
        self._moving: set[str] = set()  # classes of cache layers that steps leave in other memory
        self._constants = Constants()
        self._kept = static_cache.KeptCache(self._drop)
        self._caches: dict[str, StaticCache] = {}  # of the step that runs, by input
        self._fingerprint: int | None = None
        self._out_of_memory = 0
        self._stepping = False
        self._paused = 0
        self._not_static: str | None = None
        self._warned: set[str] = set()

    # --- in transformers' generate --------------------------------------------------------------

    def plug_in(self) -> Callable[[], None]:
        """Answer `generate` when it asks for a compiled forward; returns what undoes it."""
        model = self._model
        config = getattr(model, "generation_config", None)
        if self._enabled:
            self._passes.unasked = self._unasked
            self._passes.generation_begins = self.look_at_model
        if config is None:
            return lambda: None
        settings = {name: getattr(config, name, None) for name in _SETTINGS}
        methods = {name: vars(model).get(name) for name in _METHODS}
        config.disable_compile = not self._enabled
        if self._enabled:
            if self._device.type == "cuda":
                self._not_static = static_cache.why_not_static(type(model), model.config)
                if self._not_static is not None:
                    self._warn(self._not_static)
                elif config.cache_implementation is None:
                    config.cache_implementation = "static"
            vars(model)["get_compiled_call"] = lambda *_: self.step
            prepare = getattr(model, "_prepare_static_cache", None)
            if prepare is not None:
                vars(model)["_prepare_static_cache"] = self._kept.reusing(prepare)

        def undo() -> None:
            for name, value in settings.items():
                setattr(config, name, value)
            for name, method in methods.items():
                vars(model).pop(name, None)
                if method is not None:
                    vars(model)[name] = method

        return undo

    def _unasked(self) -> None:
        """Warn of decode steps that `generate` did not ask of us."""
        if not (self._stepping or self._paused or self.reason or self._not_static):
            self._warn("nobody asks for these, as with beams, or in a loop of one's own")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run every step in the body as it is, so that hooks and recorders see it."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def look_at_model(self) -> None:
        """Forget captured steps if the model has changed since; called before a generation."""
        now = self._fingerprint if self._paused else fingerprint(self._model)
        if now != self._fingerprint:
            self._fingerprint, self.reason = now, None  # what was in the way may be gone
            self._drop()

    def forget(self) -> None:
        """Free the graphs, their buffers and the kept cache."""
        self._drop()
        self._kept.forget()

    def _drop(self) -> None:
        self._kinds, self._pool = {}, None

    # --- one step -------------------------------------------------------------------------------

    def step(self, **inputs: Any) -> Any:
        """Compute one forward pass of the model with these arguments, by replay if possible."""
        # Held while a step runs and no longer, so that it is known when nobody else holds them.
        self._caches = {name: one for name, one in inputs.items() if isinstance(one, StaticCache)}
        self._stepping = True
        try:
            as_it_is = self._paused or self.reason or self._passes.in_prompt(inputs)
            key = None if as_it_is else self._key(inputs)
            return self._model(**inputs) if key is None else self._step(key, inputs)
        finally:
            self._stepping, self._caches = False, {}

    def _key(self, inputs: Mapping[str, Any]) -> tuple | None:
        """Describe the kind of a step with *inputs*; None if it cannot be captured."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        kept = [name for name in _KEPT if inputs.get(name)]
        if kept:
            self._warn(f"{kept[0]} is asked for, and would be overwritten by the next step")
            return None
        kind = self._device.type
        key: list[Any] = [torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
        key += [torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)]
        for name in sorted(inputs):
            value = inputs[name]
            if isinstance(value, StaticCache):
                if getattr(value, "offloading", False):
                    self._warn("its cache is offloaded, and moves in every step")
                    return None
                if any(type(layer).__name__ in self._moving for layer in value.layers):
                    return None
                key.append((name, self._cache_kinds.of(value)))
                continue
            part = signature(value)
            if part is None:
                self._warn(f"nothing is known of its input {name}, a {type(value).__name__}")
                return None
            key.append((name, part))
        return tuple(key)

    def _step(self, key: tuple, inputs: Mapping[str, Any]) -> Any:
        if key not in self._kinds and len(self._kinds) >= _MOST_KNOWN:
            # At most a quarter of them is captured.
            self._kinds.pop(next(k for k, one in self._kinds.items() if one.captured is None))
        kind = self._kinds.setdefault(key, Kind())
        if kind.never:
            return self._model(**inputs)
        if not kind.ran:
            return self._as_it_is(kind, inputs)
        counts = [static_cache.counts(cache) for cache in self._caches.values()]
        self._passes.completion_begins()  # no hook says so, and it may ask the device
        if kind.captured is None and not self._capture(kind, inputs, counts):
            return self._model(**inputs)
        assert kind.captured is not None
        fill(kind.buffers, inputs)
        kind.captured.replay()
        self._set_counts(counts, 1)
        self.replayed += 1
        output = kind.captured.output
        return type(output)(**{**output, **self._caches})

    def _as_it_is(self, kind: Kind, inputs: Mapping[str, Any]) -> Any:
        """Run a first step, which compiles the kernels too, and learn whether to capture others."""
        before = list(map(static_cache.describe, self._caches.values()))
        with self._constants.learning(), waits(self._device) as waited:
            output = self._model(**inputs)
        if waited:
            kind.waited += 1
            if kind.waited == _WAITS:
                kind.never = True
                self._warn(f"they wait for the device, at {waited[0]}")
            return output
        after = map(static_cache.describe, self._caches.values())
        odd: set[str] = set().union(*map(static_cache.moved, before, after))
        if odd:
            self._moving |= odd
            self._warn(f"a step leaves other memory in {', '.join(sorted(odd))} of its cache")
        else:
            kind.ran = self._passes.mode == DEVICE
            kind.never = self._passes.mode == PARTS
        return output

    def _capture(self, kind: Kind, inputs: Mapping[str, Any], counts: Counts) -> bool:
        """Capture one kind of step; False, after a warning, if that does not work."""
        buffers = {n: buffer(value) for n, value in inputs.items() if n not in self._caches}
        captured = [key for key, one in self._kinds.items() if one.captured is not None]
        if len(captured) >= _MOST_KINDS:  # the oldest goes before the new one takes memory
            self._kinds.pop(captured.pop(0))
        if self._pool is None and self._stream is not None:
            self._pool = torch.cuda.graph_pool_handle()

        def run() -> Any:
            self._set_counts(counts)
            return self._run(buffers)

        try:
            kind.captured = self._make(run, self._pool, self._stream)
        except Exception as error:  # whatever a kernel or the driver objects to
            self._set_counts(counts)
            self._failed(cause(error))
            return False
        kind.buffers = buffers
        self.captured += 1
        return True

    def _failed(self, error: BaseException) -> None:
        """Try no more captures after one failed; for want of memory, a few times more."""
        reason = f"capturing a step failed: {first_line(error)}"
        no_room = isinstance(error, torch.OutOfMemoryError)
        self._out_of_memory += no_room
        if not no_room or self._out_of_memory == _TRIES:
            self.reason = reason
        self._drop()
        self._passes.settle()
        self._warn(reason)

    def _run(self, buffers: dict[str, Any]) -> Any:
        """Compute a pass on *buffers*; the output lacks the cache, which a graph must not hold."""
        batch, length = buffers["input_ids"].shape
        # Whether something came before is known here; asking the cache would wait for it.
        self._passes.given = Batch(batch, length, 1, 0, None)
        try:
            with ExitStack() as body:
                for cache in self._caches.values():
                    body.enter_context(static_cache.uncounted(cache))
                body.enter_context(self._constants.giving())
                output = self._model(**buffers, **self._caches)
            return type(output)(
                **{name: one for name, one in output.items() if not isinstance(one, Cache)}
            )
        finally:
            self._passes.given = None

    def _set_counts(self, counts: Counts, more: int = 0) -> None:
        for cache, values in zip(self._caches.values(), counts, strict=True):
            static_cache.set_counts(cache, values, more)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            _log.warning(
                "decode steps are launched one kernel at a time, not as CUDA graphs: %s", reason
            )


# What decides in Python how a module computes; all but the first are PEFT's.
_MODES = ("training", "_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


def fingerprint(model: nn.Module) -> int:
    """Hash what a captured step relies on: where weights lie, hooks, adapters, attention."""
    config: Any = getattr(model, "config", None)
    texts = [config, config.get_text_config(decoder=True)] if config is not None else []
    parts: list[Any] = [getattr(one, "_attn_implementation", None) for one in texts]
    for module in model.modules():
        own = vars(module)
        for held in (own["_parameters"], own["_buffers"]):
            parts += [0 if tensor is None else tensor.data_ptr() for tensor in held.values()]
        parts += [tuple(own[name]) for name in ("_forward_hooks", "_forward_pre_hooks")]
        parts += [str(own[name]) for name in _MODES if name in own]
        parts.append(id(own.get("forward")))
    return hash(tuple(parts))
