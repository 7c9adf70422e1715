"""
What do packed experts, and a packed backbone, cost in perplexity on the shipped model?

Bad news would be more than .05 % for int8 or .5 % for int4 at 4.5 bits. Each expert is put into
codes and read back, as slots hold it; the baseline is the model as it is stored, on the same texts,
paired. Beside our formats stand the other ways to spend 4.5 bits that were weighed for int4: evenly
spaced codes from minimum to maximum, the same placed by HQQ's half-quadratic fit (arXiv's
implementation: mobiusml/hqq), and NF4 (arXiv:2305.14314) with a float16 scale for 32 weights.
Where 64 does not divide the 96 inputs of this model's down projections, groups have 32.
Floor: no change. Not measured: speed, larger models, which bear it better.

    python benchmarks/compression.py [--documents 32] [--out benchmarks/results/compression.json]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import publish
from torch import Tensor
from transformers import AutoModelForCausalLM

from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode, load_examples
from melinoe.evaluate import perplexity, perplexity_increase
from melinoe.experts.format import PackedFormat, groups_of
from melinoe.experts.formats import named_format
from melinoe.experts.integer import Integer
from melinoe.moe.experts import find_experts
from melinoe.moe.packed_backbone import pack_backbone
from melinoe.shipped import GSM8K_TEST, HELD_OUT, TINY_OLMOE

NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461,
       0.3379, 0.4407, 0.5626, 0.7230, 1.0)  # fmt: skip
Way = Callable[[Tensor], Tensor]


def there_and_back(kind: PackedFormat) -> Way:
    """Weights ``(outputs, inputs)`` as a block in *kind* means them."""
    return lambda w: kind.decode_matrix(kind.encode_matrix(w), *w.shape)


def hqq(weights: Tensor, bits: int = 4, group: int = 64) -> Tensor:
    """HQQ: shrink the error by an l_.7 norm and fit the zero point to the rest, 20 times."""
    x = weights.view(-1, groups_of(weights.shape[1], group))
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = ((2**bits - 1) / (high - low).clamp(min=1e-8)).half().float()
    zero, beta, best = -low * scale, 10.0, float("inf")
    for _ in range(20):
        codes = (x * scale + zero).round().clamp(0, 2**bits - 1)
        error = x - (codes - zero) / scale
        kept = error.sign() * (error.abs() - error.abs().pow(-0.3) / beta).clamp(min=0)
        if float(error.abs().mean()) >= best:
            break
        best = float(error.abs().mean())
        zero = (codes - (x - kept) * scale).mean(1, keepdim=True)
        beta *= 1.01
    zero = zero.half().float()
    codes = (x * scale + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) / scale).view_as(weights)


def nf4(weights: Tensor, group: int = 32) -> Tensor:
    """NF4: the nearest of 16 levels of the group's largest weight."""
    x, levels = weights.view(-1, group), torch.tensor(NF4)
    scale = x.abs().amax(1, keepdim=True).half().float().clamp(min=1e-7)
    codes = torch.bucketize(x / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * scale).view_as(weights)


WAYS: dict[str, Way] = {
    "int8": there_and_back(named_format("int8")),
    "int4": there_and_back(named_format("int4")),
    "even codes": there_and_back(Integer(4, 64)),
    "even codes, HQQ": hqq,
    "NF4": nf4,
    "int4-g64": there_and_back(named_format("int4-g64")),
}


def texts(tokenizer: Any, documents: int, length: int) -> list[Any]:
    """Token ids of all corpora, all of which count."""
    paths = [GSM8K_TEST, *sorted(HELD_OUT.glob("*.jsonl"))]
    found = [encode(load_examples(str(p), limit=documents), tokenizer, length) for p in paths]
    return [
        replace(one, completion_mask=[False] + [True] * (len(one) - 1))
        for corpus in found
        for one in corpus
    ]


def changed(model: Any, way: Way) -> tuple[Any, float]:
    """A copy whose experts are what *way* makes of them, and their relative error."""
    ours, error, square = copy.deepcopy(model), 0.0, 0.0
    for layer in find_experts(ours):
        for tensor in layer.tensors:
            stack = layer.module.get_parameter(tensor.name).data
            for expert in stack:
                true = expert.float().contiguous()
                found = way(true)
                error += float((found - true).double().square().sum())
                square += float(true.double().square().sum())
                expert.copy_(found)
    return ours, (error / square) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=32, help="of each corpus")
    parser.add_argument("--length", type=int, default=512, help="tokens of each at most")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    # In float32, so that rounding to the model's bfloat16 is no part of the price.
    model = AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(TINY_OLMOE), model.config)
    every = texts(tokenizer, arguments.documents, arguments.length)
    base = perplexity(model, every)
    rows: list[dict[str, Any]] = [{"what": "as stored", "perplexity": base.estimate.mean}]

    def measure(what: str, ours: Any, error: float | None) -> None:
        found = perplexity(ours, every)
        increase = perplexity_increase(found, base)
        percent = {k: 100 * getattr(increase, k) for k in ("mean", "low", "high")}
        row = {"what": what, "perplexity": found.estimate.mean}
        row |= {"perplexity_increase_percent": percent, "relative_error_of_weights": error}
        rows.append(row)
        print(json.dumps(row), flush=True)

    for name, way in WAYS.items():
        measure(f"experts: {name}", *changed(model, way))
    for name in ("int8", "int4"):
        ours, kind = copy.deepcopy(model), named_format(name)
        assert isinstance(kind, PackedFormat)
        pack_backbone(ours, kind)
        measure(f"backbone: {name}", ours, None)
    result = {
        "benchmark": "compression",
        "title": "Experts and backbone in 8 and 4 bits: perplexity of the shipped model",
        "question": __doc__.strip().splitlines()[0],
        "result": rows,
        "documents": len(every),
        "tokens": int(base.tokens.sum()),
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
