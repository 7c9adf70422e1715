"""
Compile the kernels for an A100 (sm_80) and an H100 (sm_90), which needs no GPU, and print what the
compilers say.

A process of its own, because Triton decides once whether it interprets. One JSON line: per kernel
the PTX instructions that read or write global memory or multiply matrices, whether it divides
doubles exactly, and what the machine code takes: registers of a thread, bytes of its stack and of
local memory (spills).
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from melinoe.engine.device import copying, decide, packed_kernels
from melinoe.experts.format import Part
from melinoe.experts.formats import named_format

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
_TYPES = {
    "weight_ptr": "*bf16",
    "weight_out_ptr": "*bf16",
    "load_expert_ptr": "*i32",
    "load_slot_ptr": "*i32",
    "num_loads_ptr": "*i32",
}
# What the JIT finds divisible by 16 in models of real size.
_ROUND = ("outputs", "columns", "row_stride", "code_stride", "scale_stride")


def compiled(kernel, constants, architecture, warps, stages=3, **types):
    """Compile *kernel*; pointers are to int64 and numbers int32 unless *types* says else."""
    signature = {}
    for name in kernel.arg_names:
        usual = "*i64" if name.endswith("_ptr") else "i32"
        signature[name] = types.get(name, _TYPES.get(name, usual))
        if name in constants:
            signature[name] = "constexpr"
    hints = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if kernel is packed_kernels._project and (name.endswith("_ptr") or name in _ROUND)
        and name not in constants
    }  # fmt: skip
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options).asm


def projected(architecture, name, dtype, activation, pairs, bias=False, transposed=False):
    """Compile the products of a format with *dtype*, for OLMoE's shapes."""
    how = packed_kernels.arithmetic(named_format(name), 2048)
    kinds = named_format(name).parts([Part("down_proj", (2048, 1024), getattr(torch, dtype))])
    kinds = {part.name.partition(".")[2]: _POINTERS[part.dtype] for part in kinds}
    codes = kinds.get("codes", kinds.get(""))
    scales = kinds.get("scales", codes)
    own = _POINTERS[getattr(torch, dtype)]
    constants = packed_kernels.constants(how, getattr(torch, dtype), activation, bias, pairs)
    return compiled(
        packed_kernels._project,
        constants | {"row_stride" if transposed else "column_stride": 1}, architecture,
        packed_kernels.WARPS, packed_kernels.STAGES,
        x_ptr=own, code_ptr=codes, scale_ptr=scales, offset_ptr=scales, bias_ptr=own,
        out_ptr=own if activation != "none" else "*fp32",
    )  # fmt: skip


# Each format on either architecture, few pairs and many; and what is slower, but must compile.
PRODUCTS = (
    ("sm_80", "plain", "bfloat16", "silu", 16),
    ("sm_90", "plain", "bfloat16", "none", 128, True, True),
    ("sm_90", "int8", "bfloat16", "silu", 16),
    ("sm_80", "int4", "bfloat16", "none", 0),
    ("sm_90", "mxfp4", "bfloat16", "silu", 16),
    ("sm_80", "fp8", "bfloat16", "silu", 16),
)
OTHERS = (
    ("sm_80", "fp8", "float16", "gelu", 16),
    ("sm_80", "int4", "float32", "gelu_tanh", 16),
)

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.float8_e4m3fn: "*u8", torch.int8: "*i8",
}  # fmt: skip


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
            "sm_90",
            warps,
            gamma_ptr="*fp64" if lfu else "*i64",
        )
    found["close"] = compiled(decide._close_step, {"BLOCK": 16}, "sm_90", 1)
    found["copy"] = compiled(
        copying._copy, {"WORD": tl.int64, "WORDS": 2048, "VECTOR": 2, "BYTES": 16}, "sm_90", 4
    )
    found["combine"] = compiled(
        packed_kernels._combine, {"BLOCK": 512}, "sm_90", 4,
        pair_ptr="*fp32", weight_ptr="*bf16", out_ptr="*bf16",
    )  # fmt: skip
    for kind, cases in (("project", PRODUCTS), ("other project", OTHERS)):
        for case in cases:
            found[f"{kind} " + " ".join(map(str, case))] = projected(*case)
    accesses = re.compile(r"(?:ld\.global|st\.global|cp\.async)[.\w]*")
    print(
        json.dumps(
            {
                name: {
                    "accesses": sorted(set(accesses.findall(asm["ptx"]))),
                    "exact_division": "div.rn.f64" in asm["ptx"],
                    "products": sorted(set(re.findall(r"(?:wgmma|mma)\.[.\w]*", asm["ptx"]))),
                    **resources(asm["cubin"]),
                }
                for name, asm in found.items()
            }
        )
    )


if __name__ == "__main__":
    main()
