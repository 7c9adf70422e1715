"""
How much faster than 16-bit experts does the CPU compute packed ones?

OLMoE's expert shape (hidden 2048, intermediate 1024), one layer, one thread unless told otherwise.
The baseline is transformers' `grouped_mm` experts function in bfloat16 in the same process, run in
turn with each format, on the same inputs. The ratio of the least times is what the machine can do;
that of pairs of runs, with its range, also has in it what else ran there. A token that
uses 8 experts reads 96 MiB in bfloat16 and 27 in int4: memory alone allows 3.6 at equal bandwidth,
and more than that is what the baseline loses. Bad news would be, at one token, less than 4.5 for
int4 and mxfp4, 3 for int8 or 2.5 for fp8 on a processor that permutes 16 floats (AVX-512), less
than 2 on one that does not; more than 1.15 times the time for a prompt, or an error above 1e-6 of
the product with the unpacked weights in float64. Results of the two kinds have files of their own.
Not measured: the rest of a decode step, several layers, GPUs.

    python benchmarks/packed_experts.py [--threads 1] [--out benchmarks/results/packed_experts.json]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from melinoe.experts.format import PackedFormat, Part
from melinoe.experts.formats import named_format
from melinoe.experts.packed import PackedExperts, PackedMatrix
from melinoe.experts.packed_dot import permutes_floats
from melinoe.moe.compute import StandIn

FORMATS = ("int4", "mxfp4", "int8", "fp8")
HIDDEN, INNER, TOP_K = 2048, 1024, 8
# Tokens, experts of the layer, pairs of runs: a decode step, a few sequences, a short prompt.
CASES = ((1, 8, 40), (2, 8, 20), (4, 8, 20), (8, 8, 10), (16, 8, 10), (512, 16, 4))


def make(experts: int) -> OlmoeExperts:
    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=experts)
    module = OlmoeExperts(config).to(torch.bfloat16).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return module


def packed(name: str) -> PackedFormat:
    kind = named_format(name)
    assert isinstance(kind, PackedFormat)
    return kind


def pack(module: OlmoeExperts, kind: PackedFormat) -> tuple[PackedExperts, StandIn]:
    """The function of a format, and slots that all hold the first expert: times are the same."""
    own = dict(module.named_parameters(recurse=False))
    tensors = tuple(Part(name, tuple(p.shape[1:]), p.dtype) for name, p in own.items())
    block = kind.encode(tensors, {name: p.detach()[0] for name, p in own.items()})
    slots = {name: torch.stack([part] * module.num_experts) for name, part in block.items()}
    return PackedExperts(kind, tensors), StandIn(module, slots, module.num_experts)


def error(module: OlmoeExperts, kind: PackedFormat) -> float:
    """The largest error of one projection over the largest result, against float64."""
    _, slots = pack(module, kind)
    x, matrix = torch.randn(1, HIDDEN), PackedMatrix(kind, (2 * INNER, HIDDEN), torch.bfloat16)
    parts = {name: getattr(slots, f"gate_up_proj.{name}") for name in matrix.parts}
    found = matrix.multiply(parts, x, np.zeros(1, np.int64), np.zeros(1, np.int64))
    own = {name: part[0] for name, part in parts.items()}
    true = kind.decode_matrix(own, 2 * INNER, HIDDEN).double() @ x.double()[0]
    return float((found[0].double() - true).abs().max() / true.abs().max())


def times(
    functions: dict[str, Any], inputs: tuple[torch.Tensor, ...], pairs: int
) -> dict[str, Any]:
    """Seconds of the baseline and of each format, in turn."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(pairs + 2):
        for name, (function, module) in functions.items():
            begin = time.perf_counter()
            function(module, *inputs)
            if number >= 2:
                found[name].append(time.perf_counter() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows, load = [], os.getloadavg()[0]
    with torch.inference_mode():
        for tokens, experts, pairs in CASES:
            module = make(experts)
            functions: dict[str, Any] = {"bf16": (ALL_EXPERTS_FUNCTIONS["grouped_mm"], module)}
            for name in FORMATS:
                functions[name] = pack(module, packed(name))
            hidden = torch.randn(tokens, HIDDEN).bfloat16()
            choice = torch.rand(tokens, experts).topk(TOP_K).indices
            weights = torch.full((tokens, TOP_K), 1 / TOP_K, dtype=torch.bfloat16)
            found = times(functions, (hidden, choice, weights), pairs)
            base = np.array(found["bf16"])
            for name, taken in found.items():
                ratio = base / np.array(taken)
                row = {
                    "tokens": tokens,
                    "experts": experts,
                    "format": name,
                    "least_ms": min(taken) * 1e3,
                    "speedup_of_least_times": float(base.min() / min(taken)),
                    "speedup": {
                        "median": float(np.median(ratio)),
                        "min": float(ratio.min()),
                        "max": float(ratio.max()),
                    },
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
        errors = {name: error(make(1), packed(name)) for name in FORMATS}
    result = {
        "benchmark": "packed_experts" if permutes_floats() else "packed_experts_avx2",
        "title": "Packed experts on the CPU, against bfloat16"
        + ("" if permutes_floats() else ", without AVX-512"),
        "question": __doc__.strip().splitlines()[0],
        "result": rows,
        "notes": [
            "Speedups are over transformers' grouped_mm in bfloat16, run in turn.",
            f"The machine's load average was {load:.1f} when it began.",
            "Largest error of a product, relative to the largest result: "
            + ", ".join(f"{name} {found:.1e}" for name, found in errors.items())
            + ".",
        ],
        "settings": {"threads": arguments.threads, "hidden": HIDDEN, "intermediate": INNER},
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
