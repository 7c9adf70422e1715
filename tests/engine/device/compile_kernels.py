"""
Compile the kernels for an H100 (sm_90), which needs no GPU, and print what the compilers say.

A process of its own, because Triton decides once whether it interprets. One JSON line: per kernel
the PTX instructions that read or write global memory, whether it divides doubles exactly, and what
the machine code takes: registers of a thread, bytes of its stack and of local memory (spills).
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from melinoe.engine.device import copying, decide, expanding

H100 = GPUTarget("cuda", 90, 32)
_TYPES = {
    "weight_ptr": "*bf16",
    "weight_out_ptr": "*bf16",
    "load_expert_ptr": "*i32",
    "load_slot_ptr": "*i32",
    "num_loads_ptr": "*i32",
}


def compiled(kernel, constants, warps, **types):
    """Compile *kernel*; pointers are to int64 and numbers int32 unless *types* says else."""
    signature = {}
    for name in kernel.arg_names:
        usual = "*i64" if name.endswith("_ptr") else "i32"
        signature[name] = types.get(name, _TYPES.get(name, usual))
        if name in constants:
            signature[name] = "constexpr"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=H100, options={"num_warps": warps}).asm


def resources(cubin):
    """Read with cuobjdump, which comes with Triton, what a thread takes."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


def main():
    found = {}
    for name, lfu, block, pairs, warps in (
        ("lru", False, 64, 4, 1),
        ("lfu", True, 512, 4, 4),
        ("many pairs", True, 128, 64, 4),
    ):
        found[f"decide {name}"] = compiled(
            decide._decide,
            {"BLOCK_E": block, "BLOCK_P": pairs, "LFU": lfu, "LANES": 1},
            warps,
            gamma_ptr="*fp64" if lfu else "*i64",
        )
    found["close"] = compiled(decide._close_step, {"BLOCK": 16}, 1)
    found["copy"] = compiled(
        copying._copy, {"WORD": tl.int64, "WORDS": 2048, "VECTOR": 2, "BYTES": 16}, 4
    )
    for bits in (8, 4):
        constants = {
            "TYPE": tl.bfloat16,
            "BF16": True,
            "BITS": bits,
            "GROUP": 64,
            "GROUPS": 128,
            "RAW": expanding.RAW_WEIGHTS,
        }
        found[f"expand {bits}"] = compiled(expanding._expand, constants, 4)
    accesses = re.compile(r"(?:ld|st)\.global[.\w]*")
    print(
        json.dumps(
            {
                name: {
                    "accesses": sorted(set(accesses.findall(asm["ptx"]))),
                    "exact_division": "div.rn.f64" in asm["ptx"],
                    **resources(asm["cubin"]),
                }
                for name, asm in found.items()
            }
        )
    )


if __name__ == "__main__":
    main()
