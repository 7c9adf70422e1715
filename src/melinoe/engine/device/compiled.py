"""
A decode step of fewer kernels: the model's forward pass compiled by ``torch.compile``, on request.

transformers' code launches a kernel for each norm, rotation, cast and addition; a compiler makes a
few of them. A layer's experts are one operation to it, ``melinoe::experts``, which it does not look
into. The pass is one graph, so compiling fails, if it does, before anything is computed.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from melinoe.engine.device.capture import first_line
from melinoe.engine.device.passes import DevicePasses

_log = logging.getLogger("melinoe")

# Compiled passes of one model class that torch keeps: kinds of step, and models in this process.
_KEPT = 256
# Round between fused operations where the model's own would: fewer last bits change.
_OPTIONS = {"emulate_precision_casts": True}

_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Any) -> int:
    """Number *layer*, a `DeviceExperts`, for `experts`; forgotten with the layer."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op(
    "melinoe::experts",
    mutates_args=(),
    schema="(Tensor hidden, Tensor index, Tensor weights, int layer) -> Tensor",
)
def experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    """Compute a layer's experts, as calling a `DeviceExperts`."""
    return _layers[layer](hidden, index, weights)


@experts.register_fake
def _experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


def inductor(graph: Any, example_inputs: Any) -> Callable[..., Any]:
    """Compile with PyTorch's own backend, without CUDA graphs of its own."""
    compile_graph: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")
    return compile_graph(graph, example_inputs, config_patches=_OPTIONS)


# Exchanged by tests.
backend = inductor


class CompileError(RuntimeError):
    """Compiling failed and nothing was computed; the message says why."""


class CompiledForward:
    """
    The compiled forward pass of one model; nothing is compiled before it is asked for.

    Attributes:
        reason: why it will not be used any more; None while it may be.
        compile_s: seconds that compiling has taken, the first pass included.
    """

    def __init__(self, model: nn.Module, passes: DevicePasses) -> None:
        self._model: Any = model
        self._passes = passes
        self._ran = ran = [False]  # the graph outlives us, and must not keep the model alive

        def compile_graph(graph: Any, example_inputs: Any) -> Callable[..., Any]:
            made = backend(graph, example_inputs)

            def run(*arguments: Any) -> Any:
                ran[0] = True
                return made(*arguments)

            return run

        self._backend = compile_graph
        self._forward: Callable[..., Any] | None = None
        self.reason: str | None = None
        self.compile_s = 0.0

    def first(self, inputs: Mapping[str, Any]) -> Any:
        """Compile a pass of a new kind, then compute it; `CompileError` ends all compiling."""
        if self._forward is None:
            self._forward = torch.compile(
                self._passes.forward, backend=self._backend, fullgraph=True, dynamic=False
            )
        self._ran[0] = False
        begin = time.perf_counter()
        most = {"recompile_limit": _KEPT, "accumulated_recompile_limit": 4 * _KEPT}
        try:
            with torch._dynamo.config.patch(most), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # how others' code is traced is nothing to a user
                output = self._call(inputs)
        except Exception as error:
            self.give_up(error)
            if self._ran[0]:
                raise
            raise CompileError(self.reason) from error
        gc.collect()  # tracing leaves cycles behind that hold the cache, which is to be used again
        took = time.perf_counter() - begin
        self.compile_s += took
        shape = tuple(inputs["input_ids"].shape)
        _log.info("compiled a decode step of shape %s in %.1f s", shape, took)
        return output

    def again(self, inputs: Mapping[str, Any]) -> Any:
        """Compute a pass of a kind that is compiled; RuntimeError if it would be compiled again."""
        with torch.compiler.set_stance("fail_on_recompile"):
            return self._call(inputs)

    def give_up(self, error: BaseException) -> None:
        """Use it no more, and say so, once."""
        while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
            error = inner  # torch's own says only which of its parts failed
        if self.reason is None:
            self.reason = first_line(error)
            _log.warning(
                "decode steps are not compiled, so they launch more kernels: %s", self.reason
            )

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        """Let the compiled forward compute the pass, which is followed as ever."""
        passes, before = self._passes, self._passes.forward
        assert self._forward is not None
        passes.forward, passes.traced = self._forward, True  # type: ignore[method-assign]
        try:
            return self._model(**inputs)
        finally:
            passes.forward, passes.traced = before, False  # type: ignore[method-assign]
