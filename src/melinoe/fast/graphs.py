"""
Decode steps as CUDA graphs, inside transformers' own `generate`.

`generate` asks the model for a compiled forward where its cache is static, on a GPU. We answer with
one that captures the forward pass in a CUDA graph and replays it: the first step of a kind runs as
it is, the second is captured, and from then on a step is one launch. What cannot be captured runs
step by step, after one loud warning that says why. Where compiling was asked for, the second step
of a kind is compiled and the third is captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer

from melinoe.fast.captured import CudaStep, PlainStep, Step
from melinoe.fast.compiled import CompiledForward, CompileError, first_line
from melinoe.fast.graph_inputs import buffer, fill, signature
from melinoe.fast.kept_cache import KeptCache
from melinoe.fast.passes import DEVICE, FastPasses
from melinoe.runtime.passes import Batch

_log = logging.getLogger("melinoe")

Forward = Callable[[Mapping[str, Any]], Any]

# Kinds of step (batch size, cache length) that are kept; each holds its own buffers.
_MOST_KINDS = 16


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
        self._make: Callable[[Callable[[], Any], Any], Step]
        self._make = CudaStep if device.type == "cuda" else PlainStep
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._steps: dict[tuple, tuple[dict[str, Any], Step]] = {}
        self._warm: set[tuple] = set()
        # Buffers on which steps of a kind have been compiled, and which the captured step reads.
        self._buffers: dict[tuple, dict[str, Any]] = {}
        self._caches: dict[str, Any] = {}
        self._kept = KeptCache(renewed=self._drop)
        self._paused = 0
        self.captured = self.replayed = 0
        self.reason: str | None = None

    def plug_in(self) -> Callable[[], None]:
        """Answer `generate` when it asks for a compiled forward; returns what undoes it."""
        config = getattr(self._model, "generation_config", None)
        if config is None:
            return lambda: None
        before = {name: getattr(config, name, None) for name in _SETTINGS}
        own = {name: vars(self._model).get(name) for name in _METHODS}
        config.disable_compile = not self._enabled
        if self._enabled:
            if config.cache_implementation is None and self._may_be_static():
                config.cache_implementation = "static"
            vars(self._model)["get_compiled_call"] = lambda *_: self.step
            prepare = getattr(self._model, "_prepare_static_cache", None)
            if prepare is not None:
                reusing = self._kept.reusing(prepare, lambda: self._compiles)
                vars(self._model)["_prepare_static_cache"] = reusing

        def undo() -> None:
            for name, value in before.items():
                setattr(config, name, value)
            for name, method in own.items():
                vars(self._model).pop(name, None)
                if method is not None:
                    vars(self._model)[name] = method

        return undo

    def _may_be_static(self) -> bool:
        """Whether a static cache, which is what can be captured, suits the model."""
        text = self._model.config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        return (
            self._device.type == "cuda"
            and getattr(self._model, "_can_compile_fullgraph", False)
            and kinds == {"full_attention"}
        )

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
        key = None if self._paused or self.reason else self._kind(inputs)
        if key is None:
            return self._model(**inputs)
        if key not in self._steps and key not in self._warm:
            output = self._model(**inputs)  # also what compiles the kernels
            if self._passes.mode == DEVICE:
                self._warm.add(key)
            return output
        # Held while a step runs and no longer, so that it is known when nobody else holds them.
        self._caches = {name: one for name, one in inputs.items() if isinstance(one, StaticCache)}
        try:
            if key not in self._steps and self._compiles and key not in self._buffers:
                output = self._first_compiled(key, inputs)
                if output is not None:
                    return output
            if key not in self._steps and not self._capture(key, inputs):
                return self._model(**inputs)
            buffers, step = self._steps[key]
            fill(buffers, inputs)
            self._passes.completion_begins()
            step.replay()
            self.replayed += 1
            return self._joined(step.output)
        finally:
            self._caches = {}

    @property
    def _compiles(self) -> bool:
        return self.compiled is not None and self.compiled.reason is None

    def _first_compiled(self, key: tuple, inputs: Mapping[str, Any]) -> Any | None:
        """The step compiled, on the buffers it will be captured with; None if that fails."""
        assert self.compiled is not None
        buffers = self._buffers[key] = self._buffers_for(inputs)
        try:
            return self._joined(self._run(self.compiled.first, buffers))
        except CompileError:
            return None
        finally:
            if not self._compiles:
                self._buffers = {}

    def _capture(self, key: tuple, inputs: Mapping[str, Any]) -> bool:
        """Capture one kind of step; False if that does not work, and then never again."""
        buffers = self._buffers.pop(key, None) or self._buffers_for(inputs)
        # The oldest goes first, and before the new one takes memory.
        if len(self._steps) >= _MOST_KINDS:
            self._steps.pop(next(iter(self._steps)))
        if self._compiles:
            assert self.compiled is not None
            try:
                self._steps[key] = self._made(self.compiled.again, buffers)
            except Exception as error:  # nothing was computed: the model's own may be captured
                self.compiled.give_up(error)
                self._passes.settle()
        if key not in self._steps:
            try:
                self._steps[key] = self._made(self._own, buffers)
            except Exception as error:  # whatever a kernel or the driver objects to
                self._give_up(f"capturing a step failed: {first_line(error)}")
                return False
        self.captured += 1
        return True

    def _made(self, forward: Forward, buffers: dict[str, Any]) -> tuple[dict[str, Any], Step]:
        return buffers, self._make(lambda: self._run(forward, buffers), self._pool)

    def _own(self, inputs: Mapping[str, Any]) -> Any:
        return self._model(**inputs)

    def _buffers_for(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: buffer(value) for name, value in inputs.items() if name not in self._caches}

    def _run(self, forward: Forward, buffers: dict[str, Any]) -> Any:
        """The pass on *buffers*; its output without the cache, which a graph must not hold."""
        batch, length = buffers["input_ids"].shape
        # Whether something came before is known here; asking the cache would wait for it.
        self._passes.given = Batch(batch, length, 1, 0, None)
        try:
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
        self._steps, self._warm, self._buffers = {}, set(), {}

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._drop()
        self._passes.settle()
        _log.warning(
            "decode steps are launched one kernel at a time, not as CUDA graphs: %s", reason
        )

    def _kind(self, inputs: Mapping[str, Any]) -> tuple | None:
        """What a captured step would have to agree in with these inputs; None if it cannot be."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        if any(inputs.get(name) for name in ("output_attentions", "output_hidden_states")):
            return None  # would be overwritten by the next step while the caller keeps them
        key: list[Any] = [torch.is_inference_mode_enabled(), torch.is_grad_enabled()]
        for name in sorted(inputs):
            part = signature(inputs[name])
            if part is None:
                cache: Any = inputs[name]
                if not isinstance(cache, StaticCache):
                    return None
                odd = {type(one).__name__ for one in cache.layers if type(one) is not StaticLayer}
                if odd:
                    self._give_up(f"the model's cache has layers of type {', '.join(sorted(odd))}")
                    return None
                layers: Any = cache.layers
                part = tuple(
                    tensor.data_ptr()
                    for one in layers
                    if one.is_initialized
                    for tensor in (one.keys, one.values, one.cumulative_length)
                )
            key.append((name, part))
        return tuple(key)


_SETTINGS = ("disable_compile", "cache_implementation")
_METHODS = ("get_compiled_call", "_prepare_static_cache")
