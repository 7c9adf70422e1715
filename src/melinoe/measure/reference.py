"""Record greedy tokens and their log-probabilities, to compare another engine's with."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from melinoe.moe.finite import GREEDY

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time there was",
    "Question: What is 12 times 7?\nAnswer:",
)
_TOP = 5


def reference_record(
    model: Any, tokenizer: Any, name: str, prompts: Sequence[str], max_new_tokens: int
) -> dict[str, Any]:
    """
    Let a model continue *prompts* greedily, and record tokens and log-probabilities.

    Give it in the type that the other engine computes in; prompts get no chat template. Of each
    prompt ``logprobs`` are natural logarithms over the whole vocabulary, in float32, and ``top``
    the five likeliest pairs of token and log-probability at each step.
    """
    rows = []
    for text in prompts:
        ids = torch.tensor([tokenizer(text).input_ids], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **GREEDY,
                num_beams=1,
                num_return_sequences=1,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = made.sequences[0, ids.shape[1] :].tolist()
        steps = [logits[0].float().log_softmax(-1) for logits in made.logits]
        rows.append(
            {
                "text": text,
                "prompt_ids": ids[0].tolist(),
                "tokens": tokens,
                "logprobs": [float(s[t]) for s, t in zip(steps, tokens, strict=True)],
                "top": [
                    [[int(i), float(v)] for v, i in zip(*s.topk(_TOP), strict=True)] for s in steps
                ],
            }
        )
    return {
        "kind": "reference",
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompts": rows,
    }
