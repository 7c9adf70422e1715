"""
Are int8 for some experts and int4 for the others worth more than one format for all?

Half of the shipped model's experts in int8 (8.5 bits a weight), half in int4 (4.5), chosen in
several ways: by use on other texts (EdgeMoE, arXiv:2308.14352), at random, by layer, by projection.
Worth it would be a choice whose price lies well below that of a random half, which has as many
bits, and half way between all int8 and all int4. A random half is also what a low-bit copy on a
miss (HOBBIT, arXiv:2411.01433) costs at a hit rate of one half. Bad news would be a choice by use
that is no better than chance. Baseline: the model as it is stored, on the same texts, paired.
Not measured: other shares than a half, larger models.

    python benchmarks/mixed_formats.py [--documents 16] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import publish
from compression import texts, there_and_back
from transformers import AutoModelForCausalLM

from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode, load_examples
from melinoe.evaluate import perplexity, perplexity_increase
from melinoe.experts.formats import named_format
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import RoutingRecorder, find_routers
from melinoe.shipped import GSM8K_TRAIN, HELD_OUT, TINY_OLMOE

HIGH, LOW = (there_and_back(named_format(name)) for name in ("int8", "int4"))


def uses(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """By layer, how often each expert is used on texts of the kinds that are measured."""
    counts = [torch.zeros(layer.num_experts) for layer in find_experts(model)]
    texts = encode(load_examples(str(GSM8K_TRAIN), limit=16), tokenizer, 512)
    for path in sorted(HELD_OUT.glob("*.jsonl")):
        texts += encode(load_examples(str(path), limit=24), tokenizer, 512)[16:]
    with torch.no_grad(), RoutingRecorder(find_routers(model)) as recorder:
        for one in texts:
            model(input_ids=torch.tensor([one.input_ids]))
            for routing in recorder.take():
                counts[routing.router.index] += torch.bincount(
                    routing.top_k_index.flatten(), minlength=len(counts[routing.router.index])
                )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=16, help="of each corpus")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(TINY_OLMOE), model.config)
    every = texts(tokenizer, arguments.documents, 512)
    base = perplexity(model, every)
    layers, used = find_experts(model), uses(model, tokenizer)
    half = layers[0].num_experts // 2
    generator = torch.Generator().manual_seed(0)
    chance = [torch.randperm(2 * half, generator=generator).argsort() for _ in layers]
    rank = [counts.argsort(descending=True).argsort() for counts in used]
    high: dict[str, Callable[[int, int, str], bool]] = {
        "all": lambda *_: True,
        "none": lambda *_: False,
        "a random half": lambda layer, expert, name: bool(chance[layer][expert] < half),
        "the other half": lambda layer, expert, name: bool(chance[layer][expert] >= half),
        "the most used half": lambda layer, expert, name: bool(rank[layer][expert] < half),
        "the least used half": lambda layer, expert, name: bool(rank[layer][expert] >= half),
        "the first half of the layers": lambda layer, expert, name: layer < len(layers) // 2,
        "the last half of the layers": lambda layer, expert, name: layer >= len(layers) // 2,
        "down projections (a third)": lambda layer, expert, name: name == "down_proj",
    }
    rows: list[dict[str, Any]] = []
    for what, is_high in high.items():
        ours = copy.deepcopy(model)
        for layer in find_experts(ours):
            for tensor in layer.tensors:
                for expert, weights in enumerate(layer.module.get_parameter(tensor.name).data):
                    way = HIGH if is_high(layer.index, expert, tensor.name) else LOW
                    weights.copy_(way(weights.float().contiguous()))
        increase = perplexity_increase(perplexity(ours, every), base)
        percent = {k: 100 * getattr(increase, k) for k in ("mean", "low", "high")}
        rows.append({"in int8": what, "perplexity_increase_percent": percent})
        print(json.dumps(rows[-1]), flush=True)
    shares = [
        float(counts.sort(descending=True).values[:half].sum() / counts.sum()) for counts in used
    ]
    result = {
        "benchmark": "mixed_formats",
        "title": "Half of the experts in int8, half in int4: perplexity of the shipped model",
        "question": __doc__.strip().splitlines()[0],
        "result": rows,
        "uses_of_the_most_used_half": shares,
        "tokens": int(base.tokens.sum()),
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
