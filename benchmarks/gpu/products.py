"""
Do the kernels read packed experts as fast as device memory gives them?

The floor is the bytes of the distinct experts that were chosen over the rate of a device copy. Bad
news would be a share below .5 at 8 pairs: then decoding, or too little under way, is what bounds a
step. Each call of a graph has other experts, more in all than the GPU's cache holds. Not measured:
deciding, copying, and prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import link
import shapes
import torch
from sections import Bench

from melinoe.engine.device import packed_kernels
from melinoe.engine.device.packed_kernels import KernelExperts
from melinoe.engine.device.support import grouped_mm_waits
from melinoe.experts.formats import named_format
from melinoe.moe.compute import StandIn
from melinoe.moe.dispatch import transformers_function

FORMATS = ("int4", "mxfp4", "fp8", "int8", "plain")
TOKENS = (1, 4, 16)
CALLS = 24
# Rows that a program computes and loads under way, tried for one token in 4 bits beside the usual.
OTHERS = ((16, 4), (32, 8), (64, 4))


def measure(bench: Bench, shape: Any, found: dict, kind: str) -> None:
    """Time one layer's experts by format, 8 to 128 pairs; rivals on the same bytes beside them."""
    for name in FORMATS:
        layer = shapes.find_experts(shapes.on_meta(shape))[0].stored_as(named_format(name))
        one = {t.name: torch.randn(t.shape).mul_(0.02).to(t.dtype) for t in layer.tensors}
        slots = {
            part: value[None].repeat(shape.experts, *[1] * value.dim()).to(bench.device)
            for part, value in layer.format.encode(layer.tensors, one).items()
        }
        stand_in = StandIn(layer.module, slots, shape.experts)
        ours = partial(KernelExperts(layer), stand_in)
        ways: dict[str, Callable[..., Any]] = {"fast": ours}
        if name in ("int4", "mxfp4"):
            for rows, stages in OTHERS:
                way = partial(_tuned, ours, rows, stages)
                ways[f"fast, {rows} rows, {stages} stages"] = way
        if name == "plain" and not _waits(bench.device):
            ways["transformers, grouped_mm"] = partial(
                transformers_function(layer.module), stand_in
            )
        if name == "mxfp4" and (rival := _grouped_nf4_gemm(bench, slots)) is not None:
            ways["grouped-nf4-gemm"] = rival
        for tokens in TOKENS:
            calls = 2 if bench.dry else CALLS
            drawn = [_draw(shape, tokens, seed, bench.device) for seed in range(calls)]
            experts = sum(index.unique().numel() for _, index, _ in drawn) / calls
            nbytes = experts * layer.block_bytes
            for engine, compute in ways.items():
                # Others are tried for one token; the rival is told each group's size by the host.
                if tokens > 1 and engine not in ("fast", "transformers, grouped_mm"):
                    continue
                took = _seconds(compute, drawn, bench.device)
                roof = found.get("device")
                bench.add(
                    section="products", model=shape.name, engine=engine, experts=name,
                    pairs=tokens * shape.top_k, distinct=experts, seconds=took,
                    bytes_per_s=nbytes / took,
                    share_of_memory=nbytes / took / roof if roof else None,
                )  # fmt: skip


def _tuned(compute: Callable[..., Any], rows: int, stages: int, *given: Any) -> Any:
    """Compute with other constants of the kernel; captured, they stay."""
    before = packed_kernels.OUTPUTS, packed_kernels.STAGES
    packed_kernels.OUTPUTS, packed_kernels.STAGES = rows, stages
    try:
        return compute(*given)
    finally:
        packed_kernels.OUTPUTS, packed_kernels.STAGES = before


def _draw(shape: Any, tokens: int, seed: int, device: torch.device) -> tuple[Any, Any, Any]:
    """Hidden states, slots and weights of one call."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack(
        [torch.randperm(shape.experts, generator=generator)[: shape.top_k] for _ in range(tokens)]
    )
    hidden = torch.randn(tokens, shape.hidden, generator=generator).to(device, torch.bfloat16)
    weights = torch.full(index.shape, 1 / shape.top_k, device=device)
    return hidden, index.to(device), weights


def _seconds(compute: Callable[..., Any], drawn: list[tuple[Any, ...]], device: Any) -> float:
    """Seconds of one call, all of *drawn* in one graph."""

    def run() -> None:
        for given in drawn:
            compute(*given)

    run()  # compiles
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return link.seconds([run] * (link.REPEATS + 1), device) / len(drawn)


def _waits(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return grouped_mm_waits(torch.cuda.get_device_capability(device), torch.bfloat16)


def _grouped_nf4_gemm(bench: Bench, slots: dict[str, Any]) -> Callable[..., Any] | None:
    """Its products on the same bytes, for one token; None where it is not installed."""
    try:
        from mxfp4_grouped import gemm_mxfp4_grouped
    except ImportError:
        return None
    if bench.device.type != "cuda":
        return None

    def compute(hidden: Any, index: Any, weights: Any) -> Any:
        pairs = index.numel()
        ids, each = index.reshape(-1).int(), [1] * pairs
        both = gemm_mxfp4_grouped(
            hidden.repeat(pairs, 1), slots["gate_up_proj.codes"], slots["gate_up_proj.scales"],
            each, ids,
        )  # fmt: skip
        gate, up = both.chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate) * up
        outputs = gemm_mxfp4_grouped(
            inner, slots["down_proj.codes"], slots["down_proj.scales"], each, ids
        )
        return (outputs * weights.reshape(-1, 1)).sum(dim=0)

    return compute
