"""
What does recomputing layers in the backward pass cost in time, and what does it save in memory?

Steps of fine-tuning on the CPU with the default terms, in one process and in turn: layers
recomputed, activations kept. A model of OLMoE-1B-7B's width with few layers and random weights in
bf16, one text of 512 tokens. Ratios are of steps that follow each other; the first pair is dropped.

The floor: a step is a forward pass and a backward pass of twice its work, so recomputing costs a
third more. The bad news would be more than half more, or a peak that is not lower.

Not measured: CUDA, where layers are not recomputed unless told to; reading, writing.

    python benchmarks/recomputing.py --out benchmarks/results/recomputing.json
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import publish, spread
from load_memory import status
from transformers import OlmoeConfig, OlmoeForCausalLM

from melinoe.config import FinetuneSettings
from melinoe.finetune.objective import Objective
from melinoe.finetune.parts import make_trainable
from melinoe.finetune.preparing import ReadyModel
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers


class Steps:
    """Steps of one model, its layers recomputed or not."""

    def __init__(self, layers: int, tokens: int, vocabulary: int) -> None:
        config = OlmoeConfig(num_hidden_layers=layers, vocab_size=vocabulary, pad_token_id=0)
        torch.manual_seed(0)
        model = OlmoeForCausalLM(config).to(torch.bfloat16).train()
        settings = FinetuneSettings(lambda_replay=0.0, compute_dtype="float32")
        routers, experts = find_routers(model), find_experts(model)
        self.ready = ReadyModel(model, settings, True)
        parts = make_trainable(model, routers, experts, settings, rank=16)
        self.objective = Objective(routers, settings)
        self.optimizer = torch.optim.AdamW(parts.all(), lr=1e-5)
        ids = torch.arange(tokens)[None] * 97 % (vocabulary - 3) + 3
        one = torch.ones_like(ids)
        self.batch = {"input_ids": ids, "attention_mask": one, "labels": ids}
        self.model = model

    def step(self, recompute: bool) -> dict[str, float]:
        """Take one; seconds, the peak of resident memory within it, and the loss."""
        self.ready.recompute(recompute)
        Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
        before, started = status("VmRSS"), time.process_time()
        total = self.objective.measure(self.model, self.batch, training=True).total
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.process_time() - started
        return {"s": seconds, "bytes": status("VmHWM") - before, "loss": float(total.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    steps = Steps(arguments.layers, arguments.tokens, arguments.vocabulary)
    pairs = [(steps.step(True), steps.step(False)) for _ in range(arguments.rounds + 1)][1:]
    recomputed, kept = zip(*pairs, strict=True)
    ways: dict[str, Any] = {"recomputed": recomputed, "kept": kept}
    result = {
        "benchmark": "recomputing",
        "title": f"Layers recomputed in the backward pass, {arguments.layers} layers of OLMoE's "
        f"width, {arguments.tokens} tokens",
        "result": [
            {
                "activations": name,
                "step (processor s)": spread([one["s"] for one in found]),
                "peak of a step (GiB)": spread([one["bytes"] / 2**30 for one in found]),
            }
            for name, found in ways.items()
        ]
        + [
            {
                "activations": "recomputed over kept",
                "step (processor s)": spread([a["s"] / b["s"] for a, b in pairs]),
                "peak of a step (GiB)": spread([a["bytes"] / b["bytes"] for a, b in pairs]),
            }
        ],
        "notes": ["The last row holds ratios of neighbouring steps."],
        "losses": [round(one["loss"], 6) for pair in pairs for one in pair],
    }
    publish(result, arguments.out)


if __name__ == "__main__":
    main()
