"""The fast engine's kernels, run in Triton's interpreter on the CPU; see tests/conftest.py."""

import triton

assert triton.knobs.runtime.interpret, "these tests need TRITON_INTERPRET=1"
