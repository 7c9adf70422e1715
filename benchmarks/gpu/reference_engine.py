"""
How far is the reference engine from the all-resident model and from the link, on a GPU?

Bad news would be: with every expert resident it decodes more than 10 % slower than plain
transformers; or with misses the time per token is far above what the link needs, which is the
host's share. OLMoE's dimensions with random weights; random routers pick experts nearly evenly, so
the miss rate is what chance makes it at the given slots, and is printed.

Floors: link seconds per token = loads x bytes of one expert / measured pinned copy bandwidth;
memory seconds = bytes read per token / measured device copy bandwidth. Not measured: a trained
model's routing, batches, prefill apart.

    python benchmarks/gpu/reference_engine.py --out FILE [--layers 16] [--tokens 64]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import melinoe
from melinoe.measure import machine, write_json


def link_bandwidth(gigabytes: float = 1.0) -> dict[str, float]:
    """Bytes per second of large copies: pinned host to device, and device to device."""
    size = int(gigabytes * 2**30)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    first, second = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    found = {}
    for name, source, factor in (("host_to_device", host, 1), ("device_to_device", second, 2)):
        times = []
        for _ in range(6):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            first.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        found[name] = factor * size / statistics.median(times[1:])
    return found


def build(layers: int) -> OlmoeForCausalLM:
    """OLMoE-1B-7B's dimensions, random bf16 weights, on the GPU."""
    config = OlmoeConfig(
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = OlmoeForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    model.set_experts_implementation("grouped_mm")
    model.generation_config.disable_compile = True
    return model


def decode_s(model: OlmoeForCausalLM, tokens: int, repeats: int) -> list[float]:
    """Seconds per token after the first, of greedy decoding from 16 tokens."""
    ids = torch.arange(100, 116, device="cuda").reshape(1, -1)
    per_token = []
    for _ in range(repeats + 1):
        spent = []
        for count in (1, tokens + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            with torch.no_grad():
                model.generate(input_ids=ids, max_new_tokens=count, do_sample=False)
            torch.cuda.synchronize()
            spent.append(time.perf_counter() - begin)
        per_token.append((spent[1] - spent[0]) / tokens)
    return per_token[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    roofs = link_bandwidth()
    model = build(args.layers)
    expert_bytes = 3 * 2048 * 1024 * 2
    backbone_bytes = sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." not in n
    )
    plain = statistics.median(decode_s(model, args.tokens, args.repeats))
    rows = [{"configuration": "transformers, all resident", "tokens_per_s": 1 / plain}]
    store: Any = "pinned"  # filled and locked once, which takes seconds; then used again
    for slots in (64, 48, 32, 16, 8):
        with melinoe.attach(model, slots=slots, store=store) as handle:
            store = handle.store
            if slots == 64:
                handle.prefetch([list(range(64))] * args.layers)
            decode_s(model, 8, 1)
            handle.reset_counters()
            times = decode_s(model, args.tokens, args.repeats)
            counters, stall_s = handle.counters, handle.stall_s
            steps = int(counters.tokens[1])
        loads = counters.transfers_per_token()
        floor = max(
            loads * expert_bytes / roofs["host_to_device"],
            (backbone_bytes + args.layers * 8 * expert_bytes) / roofs["device_to_device"],
        )
        median = statistics.median(times)
        rows.append(
            {
                "configuration": f"reference engine, {slots} of 64 slots",
                "tokens_per_s": 1 / median,
                "tokens_per_s_range": [1 / max(times), 1 / min(times)],
                "miss_rate": 1 - counters.hit_rate("completion"),
                "transfers_per_token": loads,
                "share_of_floor": floor / median,
                "stall_ms_per_token": stall_s / steps * 1e3,
                "times_plain": plain / median,
            }
        )
    record = {
        "benchmark": "gpu_reference_engine",
        "question": __doc__.strip().splitlines()[0],
        "shape": {"layers": args.layers, "experts": 64, "top_k": 8, "hidden": 2048, "width": 1024},
        "routing": "random weights: nearly even use of experts",
        "bandwidth_bytes_per_s": roofs,
        "result": rows,
        "machine": machine(),
        "gpu": torch.cuda.get_device_name(),
    }
    write_json(args.out, record)
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
