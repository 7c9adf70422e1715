"""Texts and settings that every test of an outcome measures with, and loads counted by hand."""

from itertools import pairwise

import numpy as np
from small_olmoe import LAYERS

from melinoe.config import OutcomeSettings
from melinoe.data import Example

SEEDS = {"base": 0, "tuned": 5, "control": 7}
SETTINGS = OutcomeSettings(prompts=5, max_new_tokens=6, max_length=32, batch_size=4)


def texts(first=2, count=8):
    """One word to start from, so that no request needs more experts than two slots hold."""
    return [
        Example(f"w{first + i}", f"w{9 + i} w4 w{3 + i} w{20 - i}", f"x:{i}") for i in range(count)
    ]


def loads_of_two_slots(trace):
    """
    Loads and tokens of each sequence's completion.

    With as many slots as a token has experts, the cache holds those of the token before.
    """
    loads, tokens = [], []
    for sequence in range(trace.num_sequences):
        rows = np.flatnonzero(trace.sequence == sequence)
        pairs = list(pairwise(rows))
        loads.append(
            sum(
                len(set(trace.experts[two, layer]) - set(trace.experts[one, layer]))
                for one, two in pairs
                for layer in range(LAYERS)
            )
        )
        tokens.append(len(pairs))
    return loads, tokens
