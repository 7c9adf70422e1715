"""
A CUDA graph played on the CPU: what a captured pass did is done again, without its Python.

While a pass is recorded each operation of ATen and each launch of a Triton kernel is noted, with
the very tensors it had. A replay does them again in the same memory. So whatever Python decided, or
read as a number, stays as it was, as in a CUDA graph; and as with a graph, recording leaves no
trace: the memory that the engine and the cache hold is put back.

Where a GPU could not capture, the recording fails: if the host asks a tensor what it holds, or
makes one from numbers of its own. What this cannot show is what only a driver knows, and that
memory which a step reads may be gone: the notes hold every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime import interpreter

from melinoe.engine.device.static_cache import tensors

# Their result, or its shape, is known only when the device has computed: the host would wait.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "masked_select",
    "equal.default",
    "is_nonzero",
)
FROM_THE_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


def play(handle: Any) -> None:
    """Let *handle*, of the device engine on the CPU, record its steps instead of running them."""

    def memory() -> Iterable[torch.Tensor]:
        who = handle.engine.residencies
        yield from (who.state, who.load_expert, who.load_slot, who.num_loads, who.counts)
        for experts in handle._caches:
            yield from experts.slots.values()
        for cache in handle.graphs._caches.values():
            for layer in cache.layers:
                yield from tensors(layer)

    handle.graphs._make = lambda run, pool, stream: Tape(run, memory)


class NotCapturable(RuntimeError):
    """Raised in the place of a GPU's error for such an operation while it captures."""


class Tape:
    """
    A recorded pass; stands for `melinoe.engine.device.capture.CudaStep`.

    Args:
        run: the pass.
        memory: lists the tensors that outlive the pass.
    """

    def __init__(
        self, run: Callable[[], Any], memory: Callable[[], Iterable[torch.Tensor]]
    ) -> None:
        self._notes: list[Callable[[], None]] = []
        held = [(tensor, tensor.clone()) for tensor in memory()]
        launch = interpreter.GridExecutor.__call__
        ops = _Operations(self._notes)

        def noted(grid: Any, *args: Any, **kwargs: Any) -> None:
            with torch._C._DisableTorchDispatch():
                launch(grid, *args, **kwargs)
            self._notes.append(lambda: launch(grid, *args, **kwargs))

        interpreter.GridExecutor.__call__ = noted
        try:
            with _NothingFromTheHost(), ops:
                self.output = run()
        finally:
            interpreter.GridExecutor.__call__ = launch
            with torch.inference_mode(torch.is_inference_mode_enabled()):
                for tensor, before in held:
                    tensor.copy_(before)

    def replay(self) -> None:
        """Do it again, on what the memory holds now."""
        for again in self._notes:
            again()


class _Operations(TorchDispatchMode):
    def __init__(self, notes: list[Callable[[], None]]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(function) for name in WAITING):
            raise NotCapturable(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **kwargs)
        given = {_storage(one) for one in tree_flatten((args, kwargs))[0] if _is_tensor(one)}
        # What shares memory with an argument is a view of it, or it itself.
        fresh = [
            (place, one)
            for place, one in enumerate(tree_flatten(result)[0])
            if _is_tensor(one) and _storage(one) not in given
        ]

        def again() -> None:
            found = tree_flatten(function(*args, **kwargs))[0]
            for place, one in fresh:
                assert found[place].shape == one.shape, function
                one.copy_(found[place])

        self._notes.append(again)
        return result


class _NothingFromTheHost(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FROM_THE_HOST and not _is_tensor(args[0]):
            raise NotCapturable(
                "Cannot copy between CPU and CUDA tensors during CUDA graph capture: "
                f"{function.__name__}({args[0]!r})"
            )
        return function(*args, **(kwargs or {}))


def _is_tensor(one: Any) -> bool:
    return isinstance(one, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
