"""A prompt goes through the tokenizer's chat template, if it has one and `--raw` is not given."""

import json

import pytest
import torch
from small_olmoe import tiny_model, words_tokenizer

from melinoe.data import Example, encode_prompts
from melinoe.predictor import load_prompts
from tests import chat_templates

SAID = "chat template; --raw leaves it out"


def expected(tokenizer, prompt):
    """What transformers makes of a user's turn and the beginning of an answer."""
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("name", ["CHATML", "LLAMA3", "GEMMA", "MISTRAL", "QWEN3", "HARMONY"])
def test_a_prompt_becomes_a_user_turn_as_transformers_writes_it(name):
    """In templates of every shape; without *chat* it is tokenised as it stands."""
    tokenizer = words_tokenizer()
    tokenizer.chat_template = getattr(chat_templates, name)
    example = Example("w3 w4", "w5", "here")
    assert encode_prompts([example], tokenizer, chat=True) == [expected(tokenizer, "w3 w4")]
    assert encode_prompts([example], tokenizer) == [tokenizer("w3 w4")["input_ids"]]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A tiny checkpoint whose tokenizer has a chat template of words that it knows."""
    path = tmp_path_factory.mktemp("chat") / "olmoe"
    tiny_model().save_pretrained(path)
    tokenizer = words_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w7 {{ m.content }} w8 {% endfor %}"
        "{% if add_generation_prompt %}w9{% endif %}"
    )
    tokenizer.save_pretrained(path)
    return path, tokenizer


def test_generate_answers_the_turn_unless_raw(chat_model, melinoe):
    """The ids are those that the whole model writes; stderr says once that a template was used."""
    path, tokenizer = chat_model
    templated, plain = expected(tokenizer, "w3 w4"), tokenizer("w3 w4")["input_ids"]
    assert templated == tokenizer("w7 w3 w4 w8 w9", add_special_tokens=False)["input_ids"]
    model = tiny_model().eval()
    for more, prompt in (((), templated), (("--raw",), plain)):
        code, out, err = melinoe("generate", path, "w3 w4", "--max-new-tokens", 5, "--json", *more)
        assert code == 0, err
        assert err.count(SAID) == (not more)
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
        assert json.loads(out)["ids"] == whole[0, len(prompt) :].tolist()


def test_trace_records_the_templated_prompts_unless_raw(chat_model, tmp_path, melinoe):
    """The prompts beside the trace are what was served, and say which it was."""
    path, tokenizer = chat_model
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "w3 w4"}\n{"prompt": [{"role": "user", "content": "w5"}]}\n')
    for name, more, first in (
        ("templated", (), expected(tokenizer, "w3 w4")),
        ("raw", ("--raw",), tokenizer("w3 w4")["input_ids"]),
    ):
        out = tmp_path / f"{name}.safetensors"
        asked = ("trace", path, "--data", data, "--out", out, "--max-new-tokens", 2)
        code, _, err = melinoe(*asked, *more)
        assert code == 0, err
        assert err.count(SAID) == (not more)
        from melinoe.cache.trace import Trace

        assert load_prompts(out, Trace.load(out)) == [first, expected(tokenizer, "w5")]
