"""
What does it cost to look for numbers that are none?

Two looks, at OLMoE-1B-7B's dimensions: at the logits of every token that is written, the largest
of a row (`melinoe.moe.finite.are_finite`), and once at the weights beside the experts while a
checkpoint is loaded (`broken_weight`). The first stands beside the least that a token's pass does
anyway on a CPU: the product of the head, one row by hidden size and vocabulary.

Bad news would be more than 1 % of the head's product, or a look at the weights slower than a disk
that reads 1 GB/s.

Not measured: CUDA, where the first look waits for the device, as choosing the token does anyway.

    python benchmarks/finite.py --out benchmarks/results/finite.json
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import publish, spread
from torch import nn

from melinoe.moe.finite import are_finite, broken_weight

HIDDEN, TIMES = 2048, 30


def seconds(function: Callable[[Any], Any], argument: Any) -> dict[str, float]:
    """Median and range over `TIMES` calls, the first one left out."""
    found = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        function(argument)
        found.append(time.perf_counter() - began)
    return spread(found[1:])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for words in (50_304, 151_936):
        head = nn.Linear(HIDDEN, words, bias=False, dtype=torch.bfloat16)
        hidden = torch.randn(1, HIDDEN, dtype=torch.bfloat16)
        logits = head(hidden).float()
        look, product = seconds(are_finite, logits), seconds(head, hidden)
        weights = seconds(broken_weight, head)
        nbytes = head.weight.nbytes
        rows.append(
            {
                "vocabulary": words,
                "look at a token's logits (µs)": {k: 1e6 * v for k, v in look.items()},
                "the head's product (µs)": {k: 1e6 * v for k, v in product.items()},
                "look over product (%)": 100 * look["median"] / product["median"],
                "look at weights (GB/s)": nbytes / 1e9 / weights["median"],
            }
        )
    result = {
        "benchmark": "finite",
        "title": "What looking for NaN and infinity costs on the CPU",
        "result": rows,
    }
    publish(result, options.out)


if __name__ == "__main__":
    main()
