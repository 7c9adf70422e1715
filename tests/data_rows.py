"""A tokenizer of bytes and files of rows, for tests of what examples become."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from melinoe.data import encode, load_examples

EOS = 256
PLAIN = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer(template=PLAIN):
    """One token per byte, ids in the order of the byte-level alphabet; 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {"<eos>": EOS}
    plain = Tokenizer(models.BPE(vocabulary, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>")
    made.chat_template = template
    return made


def write(path, *rows):
    """Write rows as JSON lines; strings as they are."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def split_text(encoded, tokenizer):
    """The text that does not count and the text that does."""
    pairs = list(zip(encoded.input_ids, encoded.completion_mask, strict=True))
    return tuple(tokenizer.decode([i for i, c in pairs if c is wanted]) for wanted in (False, True))


def learned(path, tokenizer, **options):
    """Of the one row of a file: the text that does not count, and the text that does."""
    (encoded,) = encode(load_examples(path, **options), tokenizer, 10_000)
    return split_text(encoded, tokenizer)


def turns(*spoken):
    """``("user", "hi"), ...`` as messages."""
    return [{"role": role, "content": content} for role, content in spoken]
