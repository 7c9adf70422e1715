"""
Let the base model write text itself, to hold its quality where no other text is at hand.

Replayed beside the data (``lambda_replay``), it keeps narrow fine-tuning from forgetting the rest.

Source: pseudo-rehearsal, Robins, Connection Science 7(2), 1995; here for language models.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainingArguments

from melinoe.config import FinetuneSettings
from melinoe.data import Encoded, pad_token_id
from melinoe.errors import TokenizerError, TrainingError
from melinoe.finetune.objective import REPLAYED_AT_ONCE
from melinoe.finetune.rows import rows_of
from melinoe.finetune.trainer import is_sharded
from melinoe.moe.finite import GREEDY, generate_finite

OWN = "own"  # in place of anchor text: let the base model write it
SHORTEST = 8  # tokens below which a text says nothing
_AT_ONCE = 64  # sequences sampled together
_MOST = 512  # texts, where nobody says how many


def write_own_text(
    model: Any,
    tokenizer: Any,
    settings: FinetuneSettings,
    arguments: TrainingArguments,
    data: Sequence[Encoded],
) -> list[Encoded]:
    """Write `own_text` as *settings* ask for it, as long as the longest of *data*."""
    if is_sharded(arguments):
        raise TrainingError(
            "a sharded model cannot write its own anchor text before it is sharded; give a file of "
            "text as --anchor-data, or replay nothing (--lambda-replay 0)"
        )
    model.to(arguments.device)
    if (count := settings.own_texts) is None:
        steps, _ = rows_of(data, settings, arguments.world_size)
        passes = steps * settings.gradient_accumulation * arguments.world_size
        count = min(_MOST, passes * REPLAYED_AT_ONCE)
    length = max(SHORTEST, *map(len, data))
    return own_text(model, tokenizer, count, length, seed=settings.seed)


def own_text(
    model: Any, tokenizer: Any, count: int, length: int, *, seed: int = 0
) -> list[Encoded]:
    """
    Let *model* write *count* texts from an empty prompt: pure sampling at temperature 1.

    A text has 8 to *length* tokens, begins with the tokenizer's start-of-text token, else with
    end-of-text, and is all completion but for that. The model and other code's generators stay as
    they were. TokenizerError: neither token; TrainingError: a model that cannot generate, or writes
    next to nothing.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise TokenizerError(
            "the tokenizer has neither a start-of-text nor an end-of-text token, so the model "
            "cannot write from nothing; set one, give anchor text of your own, or set "
            "lambda_replay to 0"
        )
    if not hasattr(model, "prepare_inputs_for_generation"):
        raise TrainingError(
            f"{type(model).__name__} cannot generate, so it cannot write its own anchor text; give "
            "some, or set lambda_replay to 0"
        )
    device, was_training = model.get_input_embeddings().weight.device, model.training
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    texts: list[Encoded] = []
    model.eval()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(),
        ):
            torch.manual_seed(seed)
            rounds = 0
            while len(texts) < count:
                some = torch.full((min(_AT_ONCE, count - len(texts)), 1), start, device=device)
                # A checkpoint's own sampling settings would narrow what it writes.
                written = generate_finite(
                    model, some, attention_mask=torch.ones_like(some), max_new_tokens=length - 1,
                    pad_token_id=pad_token_id(tokenizer),
                    **GREEDY | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
                )  # fmt: skip
                for ids in written.tolist():
                    over = (place for place, token in enumerate(ids) if place and token in ends)
                    ids = ids[: next(over, len(ids)) + 1]
                    if len(ids) >= SHORTEST:
                        texts.append(Encoded(ids, [False, *[True] * (len(ids) - 1)]))
                if (rounds := rounds + 1) > 8 and len(texts) < rounds:
                    raise TrainingError(
                        f"the base model ends nearly every text before {SHORTEST} tokens, so it "
                        "cannot write its own anchor text; give some, or set lambda_replay to 0"
                    )
    finally:
        model.train(was_training)
    random.Random(seed).shuffle(texts)  # or the last batch's would be cut off unevenly
    return texts[:count]
