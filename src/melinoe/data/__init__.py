"""
Examples in, batches out: a prompt to condition on and a completion to learn.

    rows.py       rows of files and hub data sets
    turns.py      turns of chats, in the spellings of data sets
    examples.py   rows in TRL's forms and others' as examples; every error with its line
    rendering.py  chats as a chat template writes them, cut into turns
    encode.py     token ids, and which of them are completion; what was cut or left out
    collate.py    batches: padded, or several examples packed into one row
"""

from melinoe.data.collate import IGNORED, Collator, PackedCollator
from melinoe.data.encode import (
    Encoded,
    count_losses,
    encode,
    encode_prompts,
    pad_token_id,
)
from melinoe.data.examples import FORMS, Example, check_text, digest, load_examples
from melinoe.data.rows import data_files

__all__ = [
    "FORMS",
    "IGNORED",
    "Collator",
    "Encoded",
    "Example",
    "PackedCollator",
    "check_text",
    "count_losses",
    "data_files",
    "digest",
    "encode",
    "encode_prompts",
    "load_examples",
    "pad_token_id",
]
