"""Examples in, batches out: a prompt to condition on and a completion to learn."""

from melinoe.data.collate import IGNORED, Collator, PackedCollator
from melinoe.data.encode import Encoded, count_losses, encode, encode_prompts, pad_token_id
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
