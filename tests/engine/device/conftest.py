"""A small model, and a quicker interpreter of Triton's kernels; see tests/conftest.py."""

import inspect

import numpy as np
import pytest
import triton
import triton.language as tl
from small_olmoe import tiny_model
from triton.runtime import interpreter

from melinoe.engine.device import packed_kernels

assert triton.knobs.runtime.interpret, "these tests need TRITON_INTERPRET=1"

# The interpreter lists the members of Triton's modules anew at every call of a helper, which takes
# a third of these tests' time. What there is to find does not change, so find it once.
_builtins: dict[object, list[str]] = {}


def _patch_builtin(package, builder, scope):
    if package not in _builtins:
        members = inspect.getmembers(package)
        _builtins[package] = [name for name, one in members if tl.core.is_builtin(one)]
    for name in _builtins[package]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
    interpreter._patch_builtin = _patch_builtin


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Add up in float64: the interpreter's own way, a row's bits depend on its place in a tile."""
    product = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
    return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _create_dot


@pytest.fixture
def two_groups(monkeypatch):
    """Unroll two groups of columns instead of eight: of tiny rows the rest are zeros."""
    whole = packed_kernels.constants

    def few(*arguments):
        found = whole(*arguments)
        return found | {"UNROLL": min(found["UNROLL"], 2)}

    monkeypatch.setattr(packed_kernels, "constants", few)


@pytest.fixture(scope="module")
def original():
    """One small model for a file."""
    return tiny_model()


@pytest.fixture
def model(original):
    """It, without what generate notes on it."""
    yield original
    original.__dict__.pop("_previous_max_cache_length", None)
