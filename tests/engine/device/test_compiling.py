"""The kernels compile for an A100 and an H100, and their machine code is what it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def kernels():
    """What the compilers say; Triton keeps it by the kernels' source, so that only changes cost."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_and_none_spills_registers(kernels):
    """For sm_90, products for sm_80 too, without a GPU, down to machine code."""
    assert {"decide lru", "decide lfu", "decide many pairs", "close", "copy", "combine"} < set(
        kernels
    )
    for one in ("sm_80", "sm_90", "plain", "int8", "int4", "mxfp4", "fp8"):
        assert [name for name in kernels if "project" in name and one in name], one
    for kernel in kernels.values():  # Triton 3.6 keeps a word of stack that nothing touches
        assert kernel["local"] == 0 and kernel["stack"] <= 8


def test_copies_leave_registers_for_many_of_them(kernels):
    """65,536 registers serve a multiprocessor: four or more blocks of 128 threads at once."""
    for name, kernel in kernels.items():
        if name.startswith(("copy", "project")):
            assert 0 < kernel["reg"] <= 65536 // (4 * 128), name


def test_experts_are_moved_sixteen_bytes_at_a_time(kernels):
    """Narrower loads would leave the link idle; the hints of alignment must reach the compiler."""
    assert {"ld.global.v2.b64", "st.global.v2.b64"} <= set(kernels["copy"]["accesses"])


def test_products_read_ahead_and_multiply_alike_for_few_pairs_and_many(kernels):
    """Codes come asynchronously; one tensor core instruction in all, so that bits are the same."""
    for name, kernel in kernels.items():
        if name.startswith("project"):
            assert any(one.startswith("cp.async.c") for one in kernel["accesses"])
            assert kernel["products"] == ["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"]


def test_the_units_of_lfu_are_divided_as_on_the_host(kernels):
    """Correctly rounded, not approximated: scores must agree to the last bit."""
    assert kernels["decide lfu"]["exact_division"]
