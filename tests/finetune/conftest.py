"""A small checkpoint with its tokenizer and data, as a user would have them."""

import pytest
import torch
from data_rows import write
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny OLMoE in bfloat16 with a tokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz .?"
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {c: i for i, c in enumerate(letters, 3)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tiny_model("olmoe", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "what? ", "completion": f"{word} is it."} for word in ("a", "the", "an")]
    write(tmp_path / "data.jsonl", *rows)
    return tmp_path
