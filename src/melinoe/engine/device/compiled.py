"""
A decode step of fewer kernels: the model's forward pass compiled by ``torch.compile``, on request.

transformers' code launches a kernel for each norm, rotation, cast and addition; a compiler makes a
few of them. What decides and copies experts is one operation to it (``melinoe::bring``), which it
neither looks into nor moves: a layer's arithmetic needs the slots that this operation returns. The
pass is one graph, so compiling fails, if it does, before anything is computed.
"""

from __future__ import annotations

import gc
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from melinoe.engine.device.capture import first_line
from melinoe.engine.device.passes import DevicePasses

_log = logging.getLogger("melinoe")

# Compiled passes of one model class that torch keeps: kinds of step, and models in this process.
_MOST_COMPILED = 256
# Round between fused operations where the model's own would: fewer last bits change.
_OPTIONS = {"emulate_precision_casts": True}

# --- a layer as operations ----------------------------------------------------------------------
#
# The compiler sees tensors and a number; behind the number is the layer. An operation changes the
# slots' memory, which the compiler is not told: it would make copies of it to be safe. It need not
# know, because whatever reads the slots needs what the operation returns.

_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Any) -> int:
    """Number *layer*, a `DeviceExperts`, for `bring` and `experts`; forgotten with the layer."""
    number = next(_numbers)
    _layers[number] = layer
    return number


@torch.library.custom_op(
    "melinoe::bring",
    mutates_args=(),
    schema="(Tensor index, Tensor weights, int layer) -> (Tensor, Tensor)",
)
def bring(index: Tensor, weights: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Bring the chosen experts into slots, as `DeviceExperts.bring`: slots (int64) and weights."""
    return _layers[layer].bring(index, weights)


@bring.register_fake
def _bring(index: Tensor, weights: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    slots = torch.empty(index.shape, dtype=torch.int64, device=index.device)
    return slots, torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)


@torch.library.custom_op(
    "melinoe::experts",
    mutates_args=(),
    schema="(Tensor hidden, Tensor index, Tensor weights, int layer) -> Tensor",
)
def experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    """Compute all of a layer's experts, as calling a `DeviceExperts`."""
    return _layers[layer](hidden, index, weights)


@experts.register_fake
def _experts(hidden: Tensor, index: Tensor, weights: Tensor, layer: int) -> Tensor:
    return torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)


# --- the forward pass ---------------------------------------------------------------------------


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

    Args:
        model: a transformers model.
        experts: the `DeviceExperts` of all its layers.
        passes: of its runtime.

    Attributes:
        reason: why it will not be used any more; None while it may be.
        compile_s: seconds that compiling has taken, the first pass included.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Any], passes: DevicePasses) -> None:
        self._model: Any = model
        self._experts, self._passes = experts, passes
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
        """
        Compile a pass of a new kind, then compute it.

        Raises:
            CompileError: it cannot be compiled, and will not be tried again; nothing was computed.
        """
        if self._forward is None:
            self._forward = torch.compile(
                self._passes.forward, backend=self._backend, fullgraph=True, dynamic=False
            )
        self._ran[0] = False
        begin = time.perf_counter()
        limits = {
            "recompile_limit": _MOST_COMPILED,
            "accumulated_recompile_limit": 4 * _MOST_COMPILED,
        }
        try:
            with torch._dynamo.config.patch(limits), warnings.catch_warnings():
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
        """
        Compute a pass of a kind that is compiled.

        Raises:
            RuntimeError: torch would compile it again.
        """
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
        assert self._forward is not None
        with self._in_place():
            return self._model(**inputs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Let the compiled forward compute the passes in the body, which are followed as ever."""
        before, self._passes.forward = self._passes.forward, self._forward  # type: ignore[assignment]
        for one in self._experts:
            one.traced = True
        try:
            yield
        finally:
            for one in self._experts:
                one.traced = False
            self._passes.forward = before
