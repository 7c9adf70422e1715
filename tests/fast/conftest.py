"""The fast engine's kernels, run in Triton's interpreter on the CPU; see tests/conftest.py."""

import inspect

import triton
import triton.language as tl
from triton.runtime import interpreter

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
