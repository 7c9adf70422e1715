"""
Examples in, batches out: a prompt to condition on and a completion to learn.

    examples.py   rows of JSONL files or hub data sets, in TRL's forms; every error with its line
    encode.py     token ids, and which of them are completion
    collate.py    batches: padded, or several examples packed into one row
"""

from melinoe.data.collate import IGNORED, Collator, PackedCollator
from melinoe.data.encode import Encoded, encode, encode_prompt, pad_token_id
from melinoe.data.examples import FORMS, Example, load_examples

__all__ = [
    "FORMS",
    "IGNORED",
    "Collator",
    "Encoded",
    "Example",
    "PackedCollator",
    "encode",
    "encode_prompt",
    "load_examples",
    "pad_token_id",
]
