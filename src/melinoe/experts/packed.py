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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from torch import Tensor, nn

from melinoe.experts.format import PackedFormat, Part
from melinoe.experts.packed_dot import compiled

# From so many tokens on, unpacking an expert once takes less time than reading it for each four.
MANY = 12
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
_NO_OFFSETS = np.zeros((1, 1, 1), np.uint8)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without, float32 is three times faster."""
    found = llvmlite.binding.get_host_cpu_features()
    return any(found.get(name) for name in ("avx512bf16", "amx-bf16", "bf16"))


class PackedMatrix:
    """
    Compute with a matrix, *shape* outputs and columns, of each slot. *dtype* is that of unpacked
    weights; on the CPU bfloat16 is multiplied as such if the processor can, and all else in
    float32, as packed weights are.
    """

    def __init__(self, kind: PackedFormat, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.kind, self.shape, self.dtype = kind, shape, dtype
        self.parts = tuple(kind.matrix_parts(*shape))
        self._arithmetic = kind.arithmetic(shape[1])

    def multiply(
        self, parts: Mapping[str, Tensor], inputs: Tensor, rows: np.ndarray, slots: np.ndarray
    ) -> Tensor:
        """Multiply pairs of a float32 row and a slot, slot by slot: ``(pairs, outputs)``."""
        outputs, columns = self.shape
        prepare, multiply, _ = compiled(self._arithmetic, False)
        ordered, sums = prepare(inputs.numpy())
        product = torch.empty((len(slots), outputs), dtype=torch.float32, device="cpu")
        given = (*_arrays(parts), slots, rows, ordered, sums, product.numpy())
        threads = torch.get_num_threads()
        new, begin = not multiply.overloads, time.perf_counter()
        if new or threads == 1 or len(slots) * outputs * columns < _WORTH_THREADS:
            multiply(*given, 0, outputs)
            if new and (taken := time.perf_counter() - begin) > _WORTH_SAYING_S:
                name = self.kind.name
                _log.info("compiled the products of %s in %.1f s, kept for next time", name, taken)
            return product
        step = -(-outputs // threads)
        ends = [min(begin + step, outputs) for begin in range(0, outputs, step)]
        others = [
            _pool(threads).submit(partial(multiply, *given, begin, end))
            for begin, end in pairwise(ends)
        ]
        multiply(*given, 0, ends[0])
        for other in others:
            other.result()
        return product

    def weights(self, parts: Mapping[str, Tensor], slot: int) -> Tensor:
        """Unpack one slot, ``(outputs, columns)``; on the CPU until the next is asked for."""
        outputs, columns = self.shape
        if parts["codes"].device.type != "cpu":
            own = {kind: part[slot] for kind, part in parts.items()}
            return self.kind.decode_matrix(own, outputs, columns).to(self.dtype)
        half = self.dtype == torch.bfloat16 and multiplies_bfloat16()
        dtype, size = torch.bfloat16 if half else torch.float32, outputs * columns
        scratch = _LOCAL.__dict__.setdefault("scratch", {})
        if dtype not in scratch or scratch[dtype].numel() < size:
            with torch.inference_mode(False):
                scratch[dtype] = torch.empty(size, dtype=dtype, device="cpu")
        found: Tensor = scratch[dtype][:size].view(outputs, columns)
        compiled(self._arithmetic, half)[2](*_arrays(parts), slot, _array(found))
        return found


class PackedExperts:
    """An experts function over slots of packed blocks, called as transformers' own are."""

    def __init__(self, kind: PackedFormat, tensors: Sequence[Part]) -> None:
        dtype = next(t.dtype for t in tensors if t.name == "down_proj")
        self._matrices = {
            t.name: PackedMatrix(kind, t.rows_columns, dtype) for t in tensors if t.is_matrix
        }

    def __call__(
        self, module: Any, hidden_states: Tensor, slot_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """
        Compute all pairs of a request: ``(tokens, hidden)``, in the type of *hidden_states*.
        *module* carries the parts of all slots and its own activation; every entry of *slot_index*,
        int64 ``(tokens, top_k)``, is a slot.
        """
        tokens, top_k = slot_index.shape
        on_host = slot_index.reshape(-1).cpu().numpy()
        few = np.bincount(on_host)[on_host] < MANY
        if hidden_states.device.type != "cpu":
            few[:] = False
        shape = (len(on_host), self._matrices["down_proj"].shape[0])
        outputs = hidden_states.new_empty(shape, dtype=torch.float32)
        if few.any():
            due = np.flatnonzero(few)
            due = due[np.argsort(on_host[due], kind="stable")]
            outputs[due] = self._read(module, hidden_states, due // top_k, on_host[due])
        for slot in np.unique(on_host[~few]):
            due = np.flatnonzero(on_host == slot)
            outputs[due] = self._unpack(module, hidden_states[due // top_k], int(slot)).float()
        if module.has_post_expert_norm:
            outputs = module.post_expert_norm(outputs)
        weighted = outputs * top_k_weights.reshape(-1, 1)
        return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def _parts(self, module: Any, name: str) -> dict[str, Tensor]:
        return {kind: getattr(module, f"{name}.{kind}") for kind in self._matrices[name].parts}

    def _read(self, module: Any, hidden: Tensor, rows: np.ndarray, slots: np.ndarray) -> Tensor:
        """Compute pairs (row of *hidden*, slot) from packed rows."""

        def project(name: str, inputs: Tensor) -> Tensor:
            row_of = rows if inputs is wide else np.arange(len(slots))
            matrix, parts = self._matrices[name], self._parts(module, name)
            return _add_bias(module, name, matrix.multiply(parts, inputs, row_of, slots), slots)

        wide = hidden.float()
        return _expert(module, wide, project)

    def _unpack(self, module: Any, hidden: Tensor, slot: int) -> Tensor:
        """Compute one expert for the rows *hidden*, its weights unpacked."""

        def project(name: str, inputs: Tensor) -> Tensor:
            weights = self._matrices[name].weights(self._parts(module, name), slot)
            return _add_bias(module, name, inputs.to(weights.dtype) @ weights.T, slot)

        return _expert(module, hidden, project)


def _expert(module: Any, hidden: Tensor, project: Callable[[str, Tensor], Tensor]) -> Tensor:
    """An expert's two projections with what the module does between them."""
    if module.has_gate:
        return project("down_proj", module._apply_gate(project("gate_up_proj", hidden)))
    return project("down_proj", module.act_fn(project("up_proj", hidden)))


def _add_bias(module: Any, name: str, product: Tensor, slots: Any) -> Tensor:
    return product.add_(getattr(module, f"{name}_bias")[slots]) if module.has_bias else product


class PackedLinear(nn.Module):
    """
    A linear layer whose weight is packed, on the CPU; few rows are multiplied as they are read.
    Each row of the output has the same bits whatever else is computed with it, within few rows and
    within many. UnsupportedModelError, AttachError: the format cannot hold the weight.
    """

    def __init__(self, linear: nn.Linear, kind: PackedFormat) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._matrix = PackedMatrix(kind, (linear.out_features, linear.in_features), weight.dtype)
        for name, part in kind.encode_matrix(weight.float().contiguous()).items():
            self.register_buffer(name, part[None], persistent=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:
        """Unpack the weight, for code that does more than multiply by it."""
        parts = {kind: getattr(self, kind) for kind in self._matrix.parts}
        return self._matrix.weights(parts, 0).to(self._matrix.dtype, copy=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply *inputs* ``(..., in_features)``; in their own type."""
        parts = {kind: getattr(self, kind) for kind in self._matrix.parts}
        rows = inputs.reshape(-1, self.in_features)
        if len(rows) < MANY:
            places = np.arange(len(rows))
            product = self._matrix.multiply(parts, rows.float(), places, np.zeros_like(places))
        else:
            weights = self._matrix.weights(parts, 0)
            product = rows.to(weights.dtype) @ weights.T
        if self.bias is not None:
            product = product + self.bias
        return product.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)


def _arrays(parts: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and offsets of all slots, as the compiled functions read them."""
    codes, scales, *offsets = (_array(part) for part in parts.values())
    return codes, scales, offsets[0] if offsets else _NO_OFFSETS


def _array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array; types that numpy lacks as integers of their size."""
    stored = _AS_NUMPY.get(tensor.dtype)
    return (tensor if stored is None else tensor.view(stored)).numpy()


_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads beside the one that asks."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="melinoe-packed")
    return _pools[threads]
