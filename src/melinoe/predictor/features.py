"""Turn prompts into the numbers that a predictor reads: the served model's own embeddings."""

from collections.abc import Sequence

import torch
from torch import nn

from melinoe.errors import ModelError, TokenizerError

LAST_TOKENS = 8  # the end of a prompt says what is asked; its mean is the second half of a feature
READS_WITH = {"kind": "embeddings", "pooling": f"mean of all and of the last {LAST_TOKENS}"}


def features_of(embeddings: torch.Tensor, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Pool each prompt: the mean embedding of all its tokens, and of its last ones.

    Args:
        embeddings: ``(vocabulary, hidden)``, any device and floating type.
        prompts: Token ids, at least one each.

    Returns:
        float32 ``(prompts, 2 * hidden)`` on the CPU.

    Raises:
        TokenizerError: an id that the vocabulary does not have.
        ModelError: an embedding that is no number.
    """
    table, pooled = embeddings.detach(), []
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= table.shape[0]:
            raise TokenizerError(
                f"the prompt has token id {max(prompt)} but the model knows {table.shape[0]} "
                "tokens; use the model's own tokenizer"
            )
        vectors = table[torch.as_tensor(list(prompt), device=table.device)].float()
        pooled.append(torch.cat([vectors.mean(0), vectors[-LAST_TOKENS:].mean(0)]).cpu())
    found = torch.stack(pooled)
    if not found.isfinite().all():
        ids = {id for prompt in prompts for id in prompt}
        bad = min(id for id in ids if not table[id].isfinite().all())
        raise ModelError(
            f"the model's token embedding of id {bad} holds NaN or infinity; get the "
            "checkpoint's files again"
        )
    return found


def token_embeddings(model: nn.Module) -> torch.Tensor:
    """
    Return the model's input embedding matrix ``(vocabulary, hidden)``, not copied.

    Raises:
        ModelError: the model has none.
    """
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None or not isinstance(getattr(embedding, "weight", None), torch.Tensor):
        raise ModelError("the model has no token embeddings to read prompts with; predict nothing")
    return embedding.weight
