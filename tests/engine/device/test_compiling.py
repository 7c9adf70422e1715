"""The kernels compile for an H100, read and write 16 bytes at once, and divide doubles exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_and_none_spills_registers(kernels):
    """For sm_90, without a GPU, down to machine code."""
    assert set(kernels) == {
        "decide lru", "decide lfu", "decide many pairs", "close", "copy", "expand 8", "expand 4",
    }  # fmt: skip
    for kernel in kernels.values():  # Triton 3.6 keeps a word of stack that nothing touches
        assert kernel["local"] == 0 and kernel["stack"] <= 8


def test_copies_leave_registers_for_many_of_them(kernels):
    """65,536 registers serve a multiprocessor: four or more blocks of 128 threads at once."""
    for name in ("copy", "expand 8", "expand 4"):
        assert 0 < kernels[name]["reg"] <= 65536 // (4 * 128)


def test_experts_are_moved_sixteen_bytes_at_a_time(kernels):
    """Narrower loads would leave the link idle; the hints of alignment must reach the compiler."""
    assert {"ld.global.v2.b64", "st.global.v2.b64"} <= set(kernels["copy"]["accesses"])
    for bits in (8, 4):
        accesses = set(kernels[f"expand {bits}"]["accesses"])
        assert {"ld.global.v4.b32", "st.global.v4.b32"} <= accesses


def test_the_units_of_lfu_are_divided_as_on_the_host(kernels):
    """Correctly rounded, not approximated: scores must agree to the last bit."""
    assert kernels["decide lfu"]["exact_division"]
