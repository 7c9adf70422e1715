"""
How much faster is a decode step on the CPU whose backbone is int8, all experts resident at 4 bits?

A model of OLMoE's shape but of 4 layers and 16 experts of which a token takes 8, with random
weights; greedy decoding after a short prompt, with the linear layers beside the experts plain
(bfloat16) and packed in turn, in one process. Of the bytes that such a token reads 27 MiB a layer
are experts' and 32 attention's, 200 in all are the head's: halving the latter allows 1.4 to 1.6.
Bad news would be less than 1.2. What it costs in perplexity is in `benchmarks/compression.py`.
Not measured: prompts, several sequences, other processors.

    python benchmarks/packed_backbone.py [--threads 1] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import publish, spread
from transformers import OlmoeConfig, OlmoeForCausalLM

import melinoe
from melinoe.experts.format import PackedFormat
from melinoe.experts.formats import named_format
from melinoe.moe.packed_backbone import pack_backbone

STEPS = 12


def seconds(model: Any) -> list[float]:
    """Of each decode step after a prompt of 8 tokens."""
    times: list[float] = []
    ids = torch.arange(8)[None]
    output = model(input_ids=ids, use_cache=True)
    for _ in range(STEPS):
        begin = time.perf_counter()
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = OlmoeConfig(num_hidden_layers=4, num_experts=16, hidden_size=2048)
    model = OlmoeForCausalLM(config).to(torch.bfloat16).eval()
    kind = named_format("int8")
    assert isinstance(kind, PackedFormat)
    plain = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with melinoe.attach(model, slots=16, format="int4"), torch.inference_mode(False):
        pack_backbone(model, kind)
        packed = {name: model.get_submodule(name) for name in plain}
        found: dict[str, list[float]] = {"plain": [], "int8": []}
        with torch.no_grad():
            for turn in range(5):
                for what, modules in (("plain", plain), ("int8", packed)):
                    for name, module in modules.items():
                        model.set_submodule(name, module)
                    taken = seconds(model)
                    if turn:  # the first compiles, and loads all experts
                        found[what] += taken
    least = {what: min(times) for what, times in found.items()}
    ratios = [a / b for a, b in zip(found["plain"], found["int8"], strict=True)]
    publish(
        {
            "benchmark": "packed_backbone",
            "title": "A decode step with the backbone in int8, experts at 4 bits",
            "question": __doc__.strip().splitlines()[0],
            "result": [
                {"backbone": what, "least_ms": least[what] * 1e3, "tokens_per_s": 1 / least[what]}
                for what in found
            ],
            "speedup_of_least_times": least["plain"] / least["int8"],
            "speedup": spread(ratios),
            "settings": {"threads": arguments.threads, "layers": 4, "experts": 16},
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
