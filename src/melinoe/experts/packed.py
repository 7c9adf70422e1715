"""
Compute experts from slots that hold packed blocks, in the place of transformers' experts function.

Few tokens for an expert: its rows are multiplied as they are read (`packed_dot`). Many: the expert
is unpacked once, and torch multiplies. Both depend only on the expert's own tokens of the request.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from melinoe.experts.format import PackedFormat, Part
from melinoe.experts.packed_dot import ROWS, compiled

# From so many tokens on, unpacking an expert once takes less time than reading it for each.
MANY = 8
# Weights of a request below which further threads would wait longer than they work.
_WORTH_THREADS = 1 << 21
# What compiling may take unsaid; from disk it takes a twentieth.
_WORTH_SAYING_S = 0.5
_LOCAL = threading.local()
_log = logging.getLogger("melinoe")
_AS_NUMPY = {
    torch.float16: torch.uint16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
}


class PackedExperts:
    """
    An experts function over slots of packed blocks, called as transformers' own are.

    Args:
        kind: The format of the blocks.
        tensors: An expert's tensors, as its module has them. Where many tokens share an expert,
            bfloat16 is computed in as such, and on the CPU every other type in float32. Few tokens
            are computed in float32.
    """

    def __init__(self, kind: PackedFormat, tensors: Sequence[Part]) -> None:
        self._kind = kind
        self._matrices = {t.name: t.rows_columns for t in tensors if t.is_matrix}
        self._dtype = next(t.dtype for t in tensors if t.name == "down_proj")

    def __call__(
        self, module: Any, hidden_states: Tensor, slot_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """
        Compute all pairs of a request; every entry of *slot_index* is a slot.

        Args:
            module: Carries the parts of all slots as attributes, and the module's own activation.
            hidden_states: ``(tokens, hidden)``.
            slot_index: int64 ``(tokens, top_k)``.
            top_k_weights: ``(tokens, top_k)``.

        Returns:
            ``(tokens, hidden)``, in the type of *hidden_states*.
        """
        tokens, top_k = slot_index.shape
        on_host = slot_index.reshape(-1).cpu().numpy()
        few = np.bincount(on_host)[on_host] < MANY
        if hidden_states.device.type != "cpu":
            few[:] = False
        shape = (len(on_host), self._matrices["down_proj"][0])
        outputs = hidden_states.new_empty(shape, dtype=torch.float32)
        if few.any():
            due = np.flatnonzero(few)
            outputs[due] = self._read(module, hidden_states, due // top_k, on_host[due])
        for slot in np.unique(on_host[~few]):
            due = np.flatnonzero(on_host == slot)
            outputs[due] = self._unpack(module, hidden_states[due // top_k], int(slot)).float()
        if module.has_post_expert_norm:
            outputs = module.post_expert_norm(outputs)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def _read(self, module: Any, hidden: Tensor, rows: np.ndarray, slots: np.ndarray) -> Tensor:
        """Compute pairs (row of *hidden*, slot), reading the blocks once for each pair."""

        def project(name: str, inputs: Tensor) -> Tensor:
            row_of = rows if inputs is wide else np.arange(len(slots))
            product = self._multiply(module, name, inputs, row_of, slots)
            return (
                product.add_(getattr(module, f"{name}_bias")[slots]) if module.has_bias else product
            )

        wide = hidden.float()
        return _expert(module, wide, project)

    def _unpack(self, module: Any, hidden: Tensor, slot: int) -> Tensor:
        """Compute one expert for the rows *hidden*, its weights unpacked."""

        def project(name: str, inputs: Tensor) -> Tensor:
            weights = self._weights(module, name, slot)
            product = inputs.to(weights.dtype) @ weights.T
            return (
                product.add_(getattr(module, f"{name}_bias")[slot]) if module.has_bias else product
            )

        return _expert(module, hidden, project)

    def _multiply(
        self, module: Any, name: str, inputs: Tensor, rows: np.ndarray, slots: np.ndarray
    ) -> Tensor:
        """Product of each pair: ``(pairs, outputs)``, float32."""
        outputs, columns = self._matrices[name]
        how = self._kind.arithmetic(columns)
        prepare, multiply, _ = compiled(how, False)
        x = inputs.numpy()
        ordered = np.empty(x.shape, np.float32)  # in rows, however x lies
        sums = np.empty((len(x), columns // how.group, how.lanes), np.float32)
        prepare(x, ordered, sums)
        product = torch.empty((len(slots), outputs), dtype=torch.float32, device="cpu")
        given: tuple[Any, ...] = (
            *self._arrays(module, name),
            slots,
            rows,
            ordered,
            sums,
            product.numpy(),
        )
        threads = torch.get_num_threads()
        new, begin = not multiply.signatures, time.perf_counter()
        if new or threads == 1 or len(slots) * outputs * columns < _WORTH_THREADS:
            multiply(*given, 0, outputs)
            if new and (taken := time.perf_counter() - begin) > _WORTH_SAYING_S:
                kind = self._kind.name
                _log.info("compiled the products of %s in %.1f s, kept for next time", kind, taken)
            return product
        step = -(-outputs // threads // ROWS) * ROWS
        ends = [min(begin + step, outputs) for begin in range(0, outputs, step)]
        others = [
            _pool(threads).submit(partial(multiply, *given, begin, end))
            for begin, end in pairwise(ends)
        ]
        multiply(*given, 0, ends[0])
        for other in others:
            other.result()
        return product

    def _weights(self, module: Any, name: str, slot: int) -> Tensor:
        """The weights of one slot, ``(outputs, columns)``, until the next are asked for."""
        outputs, columns = self._matrices[name]
        half = self._dtype == torch.bfloat16
        dtype = torch.bfloat16 if half else torch.float32
        codes = getattr(module, f"{name}.codes")
        if codes.device.type != "cpu":
            kinds = self._kind.matrix_parts(outputs, columns)
            parts = {kind: getattr(module, f"{name}.{kind}")[slot] for kind in kinds}
            return self._kind.decode_matrix(parts, outputs, columns).to(self._dtype)
        scratch = _LOCAL.__dict__.setdefault("scratch", {})
        shape = (outputs, columns)
        if (shape, dtype) not in scratch:
            with torch.inference_mode(False):
                scratch[shape, dtype] = torch.empty(shape, dtype=dtype, device="cpu")
        found: Tensor = scratch[shape, dtype]
        unpack = compiled(self._kind.arithmetic(columns), half)[2]
        unpack(*self._arrays(module, name), slot, _array(found))
        return found

    def _arrays(self, module: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes, scales and offsets of all slots, as the compiled functions read them."""
        codes, scales = (_array(getattr(module, f"{name}.{kind}")) for kind in ("codes", "scales"))
        for kind in ("minimums", "zeros"):
            if hasattr(module, f"{name}.{kind}"):
                return codes, scales, _array(getattr(module, f"{name}.{kind}"))
        return codes, scales, _NO_OFFSETS


_NO_OFFSETS = np.zeros((1, 1, 1), np.uint8)


def _expert(module: Any, hidden: Tensor, project: Callable[[str, Tensor], Tensor]) -> Tensor:
    """An expert's two projections with what the module does between them."""
    if module.has_gate:
        return project("down_proj", module._apply_gate(project("gate_up_proj", hidden)))
    return project("down_proj", module.act_fn(project("up_proj", hidden)))


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array; types that numpy lacks as integers of their size."""
    return tensor.detach().view(_AS_NUMPY.get(tensor.dtype, tensor.dtype)).numpy()


_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads beside the one that asks."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="melinoe-packed")
    return _pools[threads]
