"""Examples in, batches out: a prompt to condition on and a completion to learn."""

from melinoe.data.collate import IGNORED, Collator
from melinoe.data.encode import Encoded, count_losses, encode, encode_prompts, pad_token_id
from melinoe.data.examples import FORMS, Example, check_text, digest, load_examples
from melinoe.data.rows import data_files
