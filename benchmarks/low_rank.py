"""
What does the low-rank path cost, forward and backward, computed per active expert and as PEFT does?

Three ways over the same weights in one process: the frozen layer without updates (the floor: what
any update is added to), Melinoe's updates beside the grouped products, and PEFT's ``W + B A`` of
the whole stack. First one MoE layer of OLMoE-1B-7B's dimensions with random weights, router
included, its input wanting a gradient as inside a model; then the shipped small model with a loss.
Bad news would be: slower than PEFT's at any of these sizes, or more than twice the floor's memory.

Before anything is timed, both ways get the same factors, and their outputs and the gradients of
those factors must agree. Each repeat runs all ways, in rotating order; the first round is
discarded. Two clocks, as in decode_overhead.py: on a machine that others use, and with one thread,
processor time is the one to read. Peak memory is of tensors beyond weights and adapters: on a GPU
the allocator's own, on the CPU summed over the profiler's record of one more round. Not measured:
the optimiser, whose state is the same for both.

    python benchmarks/low_rank.py [--tokens 256 2048] [--rank 32] [--repeats 5] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import publish, spread
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from melinoe.finetune.adapter import from_peft_A, from_peft_B
from melinoe.finetune.parts import LowRankUpdates
from melinoe.moe.experts import find_experts
from melinoe.shipped import TINY_OLMOE

WAYS = ("frozen", "melinoe", "peft")
Step = Callable[[], Tensor]


def three_ways(plain: nn.Module, rank: int) -> dict[str, tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Way -> module over the same weights, and its factors by name: the same numbers for both."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    plain.requires_grad_(False)
    shared = {id(p): p for p in plain.parameters()}
    ours, theirs = (copy.deepcopy(plain, dict(shared)) for _ in range(2))
    updates = LowRankUpdates(ours, find_experts(ours), rank=rank, alpha=rank, seed=0)
    targets = [f"{a.name}.{t.name}" for a in find_experts(theirs) for t in a.tensors]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets)
    wrapped = LoraModel(theirs, config, "default").model
    factors: dict[str, dict[str, nn.Parameter]] = {"melinoe": {}, "peft": {}}
    own = {layer.name: updates.of(layer) for layer in updates.layers}
    for name, module in wrapped.named_modules():
        if type(module).__name__ != "ParamWrapper":
            continue
        pair = own[name.replace(".base_layer", "")]
        projection, experts = module.parameter_name, module.num_experts
        for kind, convert in (("lora_A", from_peft_A), ("lora_B", from_peft_B)):
            weight = getattr(module, kind)["default"].weight
            nn.init.normal_(weight, std=0.02)
            parameter = getattr(pair, kind)[projection]
            parameter.data = convert(weight.detach(), experts).to(parameter.dtype).clone()
            key = f"{name.replace('.base_layer', '')}.{projection}.{kind}"
            factors["melinoe"][key], factors["peft"][key] = parameter, weight
    return {
        "frozen": (plain, {}),
        "melinoe": (ours, factors["melinoe"]),
        "peft": (wrapped, factors["peft"]),
    }


def check(
    steps: dict[str, Step], factors: dict[str, dict[str, nn.Parameter]], experts: int
) -> None:
    """Both ways give the same output and the same gradients, or their times mean nothing."""
    outputs = {way: steps[way]() for way in ("melinoe", "peft")}
    scale = float(outputs["peft"].float().abs().max())
    tolerance = 1e-3 if outputs["peft"].dtype == torch.float32 else 5e-2
    torch.testing.assert_close(
        outputs["melinoe"], outputs["peft"], rtol=tolerance, atol=tolerance * scale
    )
    for key, weight in factors["peft"].items():
        convert = from_peft_A if key.endswith("lora_A") else from_peft_B
        wanted = convert(weight.grad, experts).float()  # type: ignore[arg-type]
        found = factors["melinoe"][key].grad.float()  # type: ignore[union-attr]
        torch.testing.assert_close(
            found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max())
        )


def clear(factors: dict[str, dict[str, nn.Parameter]]) -> None:
    for own in factors.values():
        for parameter in own.values():
            parameter.grad = None


def timed(step: Step, device: str) -> tuple[float, float]:
    """Wall and processor seconds of one forward and backward pass."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_bytes(step: Step, device: str) -> int:
    """The most that tensors took at once, beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


def measure(
    name: str,
    steps: dict[str, Step],
    factors: dict[str, dict[str, nn.Parameter]],
    experts: int,
    repeats: int,
    device: str,
) -> list[dict[str, Any]]:
    """One row per way."""
    check(steps, factors, experts)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for place in range(len(WAYS)):
            way = WAYS[(repeat + place) % len(WAYS)]
            clear(factors)
            measured = timed(steps[way], device)
            if repeat:
                times[way].append(measured)
    peaks = {}
    for way in WAYS:
        clear(factors)
        peaks[way] = peak_bytes(steps[way], device)
    clear(factors)
    clock = 0 if device == "cuda" else 1  # of timed(): what ratios are of
    rows = []
    for way in WAYS:
        ratios = [m[clock] / p[clock] for m, p in zip(times[way], times["peft"], strict=True)]
        row = {
            "layer": name,
            "way": way,
            "wall_s": spread([wall for wall, _ in times[way]]),
            "processor_s": spread([cpu for _, cpu in times[way]]),
            "time_over_peft": spread(ratios),
            "peak_bytes": peaks[way],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def olmoe_layer(tokens: int, rank: int, dtype: torch.dtype, device: str) -> Any:
    """Steps, factors and number of experts for one layer at OLMoE-1B-7B's dimensions."""
    config = OlmoeConfig(intermediate_size=1024, experts_implementation="grouped_mm")
    torch.manual_seed(0)
    with torch.device(device):
        block = OlmoeSparseMoeBlock(config).to(dtype)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        hidden = torch.randn(1, tokens, config.hidden_size, dtype=dtype)
        direction = torch.randn(1, tokens, config.hidden_size, dtype=dtype)
    ways = three_ways(block, rank)

    def step_of(module: nn.Module) -> Step:
        def step() -> Tensor:
            inputs = hidden.clone().requires_grad_(True)
            result = module(inputs)
            output = result[0] if isinstance(result, tuple) else result
            (output * direction).sum().backward()
            return output.detach()

        return step

    steps = {way: step_of(module) for way, (module, _) in ways.items()}
    return steps, {way: own for way, (_, own) in ways.items() if own}, config.num_experts


def small_model(rank: int, device: str) -> Any:
    """The same for the shipped model, eight sequences of 200 tokens and a next-token loss."""
    plain = AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=torch.float32).to(device).train()
    torch.manual_seed(0)
    ids = torch.randint(0, plain.config.vocab_size, (8, 200), device=device)
    ways = three_ways(plain, rank)
    embeddings = plain.get_input_embeddings()

    def step_of(model: Any) -> Step:
        def step() -> Tensor:
            # The embeddings want a gradient, so that the frozen model has a backward pass too.
            inputs = embeddings(ids).requires_grad_(True)
            loss = model(inputs_embeds=inputs, labels=ids).loss
            loss.backward()
            return loss.detach()

        return step

    steps = {way: step_of(model) for way, (model, _) in ways.items()}
    return steps, {way: own for way, (_, own) in ways.items() if own}, plain.config.num_experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 2048])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, dtype = [], getattr(torch, arguments.dtype)
    for tokens in arguments.tokens:
        steps, factors, experts = olmoe_layer(tokens, arguments.rank, dtype, arguments.device)
        name = f"OLMoE layer, {tokens:,} tokens, {arguments.dtype}"
        rows += measure(name, steps, factors, experts, arguments.repeats, arguments.device)
        del steps, factors
    steps, factors, experts = small_model(arguments.rank, arguments.device)
    name = "small model, 1,600 tokens, float32"
    rows += measure(name, steps, factors, experts, arguments.repeats, arguments.device)
    result = {
        "benchmark": "low_rank",
        "title": "Forward and backward of expert updates: per active expert, and as PEFT does",
        "result": rows,
        "rank": arguments.rank,
        "repeats": arguments.repeats,
        "device": arguments.device,
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
