"""Settings, examples and training in a few words, for every test of fine-tuning."""

import torch
from tiny import VOCAB

from melinoe.config import FinetuneSettings
from melinoe.data import Encoded
from melinoe.finetune import train


def settings(**changes):
    """Four experts of eight, few steps, a rate that moves a random model; no anchor text."""
    defaults = {
        "capacity": 0.5,
        "steps": 2,
        "batch_size": 4,
        "max_length": 32,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup": 0.0,
        "lora_rank": 2,
        "log_every": 1,
        "lambda_replay": 0.0,
    }
    return FinetuneSettings(**defaults | changes)


def examples(count=4, seed=0):
    """Random ids with a prompt of three tokens, of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        ids = torch.randint(3, VOCAB, (8 + number % 4,), generator=generator).tolist()
        made.append(Encoded(ids, [False] * 3 + [True] * (len(ids) - 3)))
    return made


def trained(model, data=None, **changes):
    """The log rows of a short run."""
    rows = train(model, data or examples(), settings(**changes), pad_token_id=0).rows
    return rows
