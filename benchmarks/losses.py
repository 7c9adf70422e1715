"""
What share of a training step do the locality terms cost, forward and backward?

Shape: OLMoE-1B-7B's routing (16 layers, 64 experts, top-8) on a batch of 4 x 1,024 tokens, all of
them completion, with the base routers' own products included. Bad news would be 5 % or more.

The answer: seconds of the terms over the seconds that the whole step cannot do without: its
floating-point operations, counted, at the rate of one large matrix product measured in turn with
them. Counted are the forward pass of OLMoE-1B-7B and its backward pass with frozen weights (the
gradient of each product's input, not of its weight), router and rank-32 updates of the experts with
both. No step runs as fast as its operations at a matrix product's rate, so this share is an upper
bound of the true one.

The order of the ways rotates; the first round is discarded. Two clocks: wall time, and the
processor time of this process, which is the one to read on a machine that others use. Memory is of
tensors beyond the logits, summed over the profiler's record of one more round (on a GPU, the
allocator's own peak). Not measured: hidden states and replay, whose cost is another pass.

    python benchmarks/losses.py [--repeats 7] [--device cuda] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import publish, spread
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from melinoe.config import FinetuneSettings
from melinoe.finetune.objective import Objective
from melinoe.moe.routing import Router, Routing

OBJECTIVES = {
    "default: resident": {},
    "clipped": {"cache_loss": "clipped"},
    "literal": {"cache_loss": "literal"},
}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model and a batch; the defaults are OLMoE-1B-7B's."""

    layers: int = 16
    experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    intermediate: int = 1024
    vocabulary: int = 50304
    rank: int = 32
    batch: int = 4
    tokens: int = 1024

    def step_operations(self) -> float:
        """Floating-point operations of one training step; see the docstring of this file."""
        d, f, k = self.hidden, self.intermediate, self.top_k
        attention = 4 * 2 * d * d + 2 * self.tokens * d  # half of the scores are masked
        experts = k * 3 * 2 * d * f
        router = 2 * d * self.experts
        update = k * 2 * self.rank * ((d + 2 * f) + (f + d))
        head = 2 * d * self.vocabulary
        forward = self.layers * (attention + experts + router + update) + head
        # Nothing below the first layer's experts is trained, so its attention needs no gradient.
        inputs = (
            self.layers * experts + (self.layers - 1) * (attention + 2 * self.tokens * d) + head
        )
        trained = self.layers * 2 * (router + update)
        return float(self.batch * self.tokens * (forward + inputs + trained))


class Terms:
    """The terms of one batch of random routing, forward and backward, without a model."""

    def __init__(self, shape: Shape, changes: dict[str, Any], hidden: Tensor):
        generator, device = torch.Generator().manual_seed(0), hidden.device
        count = hidden.shape[0]
        routers, self.routings = [], []
        for layer in range(shape.layers):
            module = nn.Linear(shape.hidden, shape.experts, bias=False).to(device)
            router = Router(
                layer, f"gate{layer}", module, "", nn.Identity(), shape.experts, shape.experts, 8
            )
            routers.append(router)
            with torch.no_grad():
                logits = module(hidden) + 0.3 * torch.randn(
                    count, shape.experts, generator=generator
                ).to(device)
            index = logits.topk(shape.top_k).indices
            self.routings.append(Routing(router, logits.requires_grad_(), index, ((hidden,), {})))
        self.objective = Objective(routers, FinetuneSettings(lambda_replay=0.0, **changes))
        self.labels = torch.ones(shape.batch, shape.tokens, dtype=torch.int64, device=device)

    def run(self) -> Tensor:
        for routing in self.routings:
            routing.logits.grad = None
        nll = torch.zeros((), device=self.labels.device)
        total = self.objective.weigh(nll, self.routings, self.labels).total
        total.backward()
        return total


def timed(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Way -> clock -> seconds of each repeat; all ways in each round, in rotating order."""
    seconds: dict[str, dict[str, list[float]]] = {n: {"wall": [], "cpu": []} for n in ways}
    names = list(ways)
    for repeat in range(repeats + 1):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            synchronise(device)
            wall, cpu = time.perf_counter(), time.process_time()
            ways[name]()
            synchronise(device)
            if repeat:
                seconds[name]["wall"].append(time.perf_counter() - wall)
                seconds[name]["cpu"].append(time.process_time() - cpu)
    return seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that *run* holds at once beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max([0, *itertools.accumulate(sizes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=1024, help="per sequence")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    full = Shape(tokens=arguments.tokens)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.randn(full.batch * full.tokens, full.hidden, dtype=dtype, device=device)
    right = torch.randn(full.hidden, 2 * full.hidden, dtype=dtype, device=device)
    operations = 2.0 * left.shape[0] * right.numel()

    # One for all layers and ways: only its size matters, and 16 of them fill a machine.
    hidden = torch.randn(full.batch * full.tokens, full.hidden, device=device)
    terms = {name: Terms(full, changes, hidden) for name, changes in OBJECTIVES.items()}
    ways: dict[str, Callable[[], Any]] = {name: one.run for name, one in terms.items()}
    seconds = timed({**ways, "product": lambda: left @ right}, arguments.repeats, device)
    rows = []
    for name, run in ways.items():
        row: dict[str, Any] = {"terms": name}
        for clock in ("wall", "cpu"):
            rate = operations / statistics.median(seconds["product"][clock])
            step = full.step_operations() / rate
            row[f"{clock}_ms"] = spread([1e3 * s for s in seconds[name][clock]])
            row[f"share_of_step_{clock}_percent"] = spread(
                [100 * s / (step + s) for s in seconds[name][clock]]
            )
        row["peak_mib"] = peak_bytes(run, device) / 2**20
        rows.append(row)
        print(json.dumps(row), flush=True)

    result = {
        "benchmark": "losses",
        "title": "Locality terms at OLMoE-1B-7B's shape: share of the training step",
        "result": [
            {
                "terms": row["terms"],
                "forward_and_backward_ms": row["wall_ms"],
                "share_of_step_percent": row["share_of_step_wall_percent"],
                "share_of_processor_time_percent": row["share_of_step_cpu_percent"],
                "peak_mib": row["peak_mib"],
            }
            for row in rows
        ],
        "assumption": "the step runs its counted operations at the rate of a product of "
        f"{left.shape[0]} x {full.hidden} by {full.hidden} x {2 * full.hidden} in {dtype}",
        "product_gflop_per_s": spread([operations / s / 1e9 for s in seconds["product"]["wall"]]),
        "step_tflop": full.step_operations() / 1e12,
        "runs": rows,
        "shape": asdict(full),
        "repeats": arguments.repeats,
        "threads": arguments.threads,
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
