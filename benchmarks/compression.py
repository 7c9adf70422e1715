"""
What do 8- and 4-bit experts cost in perplexity, on the shipped model?

Bad news would be more than 1 % for int8 or more than 5 % for int4. Each expert is put into codes
(groups of 64 with float16 scale and minimum) and read back, as the fast engine serves it; the
baseline is the model as it is stored, on the same texts, paired. The error of the weights is also
measured with codes placed symmetrically about zero, at the same number of bits: that decided how
codes are placed. Floor: no change. Not measured: speed, larger models, which bear it better.

    python benchmarks/compression.py [--documents 32] [--out benchmarks/results/compression.json]
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import publish
from transformers import AutoModelForCausalLM

from melinoe.checkpoint import load_tokenizer
from melinoe.data import encode, load_examples
from melinoe.evaluate import perplexity, perplexity_increase
from melinoe.experts.format import PackedFormat
from melinoe.experts.formats import named_format
from melinoe.experts.integer import Integer
from melinoe.moe.experts import find_experts
from melinoe.shipped import GSM8K_TEST, HELD_OUT, TINY_OLMOE
from melinoe.stores.ram_store import RamStore
from melinoe.stores.weights import give_weights_back


def texts(tokenizer: Any, documents: int, length: int) -> dict[str, list[Any]]:
    """Per corpus, token ids, all of which count."""
    paths = {"GSM8K": GSM8K_TEST} | {path.stem: path for path in sorted(HELD_OUT.glob("*.jsonl"))}
    return {
        name: [
            replace(one, completion_mask=[False] + [True] * (len(one) - 1))
            for one in encode(load_examples(str(path), limit=documents), tokenizer, length)
        ]
        for name, path in paths.items()
    }


def packed(model: Any, name: str) -> tuple[Any, float]:
    """A copy whose experts are what their blocks mean, and how much smaller a block is."""
    ours = copy.deepcopy(model)
    layers = find_experts(ours)
    stored = [layer.stored_as(named_format(name)) for layer in layers]
    store = RamStore.from_modules(stored)
    for layer in layers:
        give_weights_back(layer, store)
    return ours, layers[0].block_bytes / stored[0].block_bytes


def relative_error(model: Any, kind: PackedFormat) -> float:
    """Root of the squared error of all experts' weights over their squares."""
    error = square = 0.0
    for layer in find_experts(model):
        own = {t.name: layer.module.get_parameter(t.name).detach() for t in layer.tensors}
        for expert in range(layer.num_experts):
            true = {name: stack[expert] for name, stack in own.items()}
            found = kind.decode(layer.tensors, kind.encode(layer.tensors, true))
            for name, weights in true.items():
                error += float((found[name].float() - weights.float()).double().square().sum())
                square += float(weights.double().square().sum())
    return (error / square) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, default=32, help="of each corpus")
    parser.add_argument("--length", type=int, default=512, help="tokens of each at most")
    parser.add_argument("--out", type=Path, help="write the result here as well")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(TINY_OLMOE).eval()
    tokenizer = load_tokenizer(str(TINY_OLMOE), model.config)
    corpora = texts(tokenizer, arguments.documents, arguments.length)
    every = [one for corpus in corpora.values() for one in corpus]
    base = perplexity(model, every)
    rows, errors = [], {}
    for compression, bits in (("int8", 8), ("int4", 4)):
        ours, times = packed(model, compression)
        found = perplexity(ours, every)
        increase = perplexity_increase(found, base)
        by_corpus = {
            name: float(
                perplexity_increase(
                    perplexity(ours, corpus),
                    perplexity(model, corpus),
                ).mean
                * 100
            )
            for name, corpus in corpora.items()
        }
        errors[compression] = {
            "with_minimum": relative_error(model, Integer(bits)),
            "symmetric": relative_error(model, Integer(bits, 64, "symmetric")),
        }
        rows.append(
            {
                "experts": compression,
                "perplexity": found.estimate.mean,
                "perplexity_increase_percent": {
                    "mean": increase.mean * 100,
                    "low": increase.low * 100,
                    "high": increase.high * 100,
                },
                "fewer_bytes_than_stored": times,
                "relative_error_of_weights": errors[compression]["with_minimum"],
                "relative_error_if_symmetric": errors[compression]["symmetric"],
            }
        )
        print(json.dumps(rows[-1]), json.dumps(by_corpus), flush=True)
    result = {
        "benchmark": "compression",
        "title": "Experts as 8- and 4-bit codes: perplexity of the shipped model",
        "question": __doc__.strip().splitlines()[0],
        "result": [
            {"experts": str(model.dtype).split(".")[-1], "perplexity": base.estimate.mean},
            *rows,
        ],
        "documents": len(every),
        "tokens": int(base.tokens.sum()),
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
