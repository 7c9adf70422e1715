"""A small model on CUDA whose steps can be captured, and greedy text of it."""

from contextlib import nullcontext

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

EXPERTS, TOP_K, LAYERS = 16, 4, 3
PROMPT = torch.arange(1, 25).reshape(1, -1)


def model(dtype=torch.bfloat16, seed=0, **options):
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_experts=EXPERTS,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=None,
        **({"num_experts_per_tok": TOP_K} | options),
    )
    found = OlmoeForCausalLM(config).to("cuda", dtype).eval()
    found.set_experts_implementation("grouped_mm")
    # On a GPU generate would decode with batched_mm, another kernel, which rounds otherwise.
    vars(found)["_optimize_model_for_decode"] = nullcontext
    return found


def generate(network, tokens=48, batch=1, **options):
    ids = PROMPT.repeat(batch, 1).to("cuda") + torch.arange(batch, device="cuda")[:, None]
    with torch.no_grad():
        return network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            **options,
        )
