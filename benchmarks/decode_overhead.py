"""
How much slower is a decoding step of the reference engine when every expert is resident?

Baseline: a copy of the model in the same process, run by transformers' own ``grouped_mm`` on its
own weights. Ours: attached with as many slots as experts, all prefetched, so that nothing is
copied: what remains is asking, counting, renumbering. Bad news would be more than 10 %.

Floor: the baseline; both do the same arithmetic on the same number of bytes. Each repeat generates
greedily from a short prompt, first one way, then the other, the next repeat the other way round;
the first pair is discarded. Two clocks: wall time, and the processor time of this process. On a
machine that others use, and with one thread, the second is the one to read: what waits for a core
is in the first. Not measured: copies, prefill, anything on a GPU.

    python benchmarks/decode_overhead.py [MODEL_DIRECTORY] [--layers 2] [--repeats 7] [--tokens 64]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import publish, spread
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from melinoe import attach

PROMPT = torch.arange(5, 21)[None]


def seconds_per_token(model: Any, tokens: int) -> tuple[float, float]:
    """Wall and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    model.generate(
        PROMPT, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return (time.perf_counter() - wall) / tokens, (time.process_time() - cpu) / tokens


def measure(name: str, plain: Any, repeats: int, tokens: int) -> dict[str, Any]:
    ours = copy.deepcopy(plain)
    experts, layers = plain.config.num_experts, plain.config.num_hidden_layers
    handle = attach(ours, slots=experts)
    handle.prefetch([range(experts)] * layers)
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for repeat in range(repeats + 1):
        pair = [("plain", plain), ("ours", ours)]
        for way, model in pair if repeat % 2 else reversed(pair):
            measured = seconds_per_token(model, tokens)
            if repeat:
                times[way].append(measured)
    assert handle.counters.loads.sum() == 0
    result: dict[str, Any] = {
        "model": name,
        "layers": layers,
        "experts": experts,
        "top_k": plain.config.num_experts_per_tok,
        "hidden_size": plain.config.hidden_size,
        "intermediate_size": plain.config.intermediate_size,
        "dtype": str(plain.dtype),
    }
    for number, clock in enumerate(("wall", "cpu")):
        base, mine = ([t[number] for t in times[way]] for way in ("plain", "ours"))
        ratios = [m / p for m, p in zip(mine, base, strict=True)]
        medians = statistics.median(mine), statistics.median(base)
        result[clock] = {
            "plain_tokens_per_s": spread([1 / s for s in base]),
            "ours_tokens_per_s": spread([1 / s for s in mine]),
            "overhead_percent": 100 * (medians[0] / medians[1] - 1),
            "overhead_percent_pairwise": spread([100 * (r - 1) for r in ratios]),
            "overhead_us_per_layer": 1e6 * (medians[0] - medians[1]) / layers,
        }
        print(f"{name}: {json.dumps(result[clock])} ({clock})", flush=True)
    return result


def olmoe_shape(layers: int, dtype: torch.dtype) -> OlmoeForCausalLM:
    """Random weights at OLMoE-1B-7B's dimensions, with fewer layers and a small vocabulary."""
    config = OlmoeConfig(
        num_hidden_layers=layers,
        intermediate_size=1024,
        vocab_size=1024,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return OlmoeForCausalLM._from_config(config, dtype=dtype).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="directory of a small OLMoE checkpoint")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = []
    if arguments.model:
        small = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        runs.append(measure("small OLMoE", small, arguments.repeats, arguments.tokens))
    large = olmoe_shape(arguments.layers, torch.bfloat16)
    runs.append(measure("OLMoE dimensions, random", large, arguments.repeats, arguments.tokens))
    result = {
        "benchmark": "decode_overhead",
        "title": "Decoding with every expert resident: the reference engine over transformers",
        "result": [
            {
                "model": f"{run['model']}, {run['layers']} layers, {run['dtype'].split('.')[-1]}",
                "transformers_tokens_per_s": run["wall"]["plain_tokens_per_s"],
                "melinoe_tokens_per_s": run["wall"]["ours_tokens_per_s"],
                "overhead_percent": run["wall"]["overhead_percent"],
                "overhead_percent_of_processor_time": run["cpu"]["overhead_percent"],
            }
            for run in runs
        ],
        "runs": runs,
        "repeats": arguments.repeats,
        "tokens": arguments.tokens,
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
