"""Chats of several turns, under templates that write earlier turns otherwise than the last."""

import pytest
from chat_templates import (
    CHATML,
    DEEPSEEK_R1,
    GEMMA,
    HARMONY,
    LLAMA3,
    MISTRAL,
    QWEN3,
)
from data_rows import byte_tokenizer, split_text, turns, write

from melinoe.data import encode, encode_prompts, load_examples
from melinoe.errors import DataError

TWO = turns(("user", "hi"), ("assistant", "yo"), ("user", "bye"), ("assistant", "ok"))
SYSTEM = turns(("system", "be brief"), ("user", "hi"), ("assistant", "yo"))

# Template, then what of TWO is prompt and what is learned, worked out by hand.
SHAPES = {
    "ChatML": (
        CHATML,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
        "yo<|im_end|>\nok<|im_end|>\n",
    ),
    "Llama 3": (
        LLAMA3,
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "yo<|eot_id|>ok<|eot_id|>",
    ),
    "Gemma": (
        GEMMA,
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
        "<start_of_turn>user\nbye<end_of_turn>\n<start_of_turn>model\n",
        "yo<end_of_turn>\nok<end_of_turn>\n",
    ),
    "Mistral": (MISTRAL, "<s>[INST] hi [/INST][INST] bye [/INST]", " yo</s> ok</s>"),
    "Qwen3": (
        QWEN3,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nok<|im_end|>\n",
    ),
    "gpt-oss": (
        HARMONY,
        "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>yo<|end|>"
        "<|start|>user<|message|>bye<|end|><|start|>assistant",
        "<|channel|>final<|message|>ok<|return|>",
    ),
    "DeepSeek-R1": (
        DEEPSEEK_R1,
        "<|User|>hi<|Assistant|>yo<|end|><|User|>bye<|Assistant|>",
        "ok<|end|>",
    ),
}


def encoded(path, template, messages, **options):
    tokenizer = byte_tokenizer(template)
    examples = load_examples(write(path / "chat.jsonl", {"messages": messages, **options}))
    return examples, tokenizer, encode(examples, tokenizer, 10_000)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_turns_are_cut_where_the_model_is_to_write(tmp_path, shape):
    """Each turn is learned as it is to be written, or is context; the text is whole either way."""
    template, prompt, completion = SHAPES[shape]
    _, tokenizer, (row,) = encoded(tmp_path, template, TWO)
    assert split_text(row, tokenizer) == (prompt, completion)
    whole = tokenizer.apply_chat_template(TWO, tokenize=False)
    assert tokenizer.decode(row.input_ids) == whole


@pytest.mark.parametrize("shape", SHAPES)
def test_generation_starts_from_the_generation_prompt(tmp_path, shape):
    """What the last answer is written from is what the template shows a model then."""
    examples, tokenizer, _ = encoded(tmp_path, SHAPES[shape][0], TWO)
    (prompt,) = encode_prompts(examples, tokenizer)
    asked = tokenizer.apply_chat_template(TWO[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == asked


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("Qwen3", "in 1 the chat template rewrites assistant turns once the chat goes on, so 1 of"),
        ("gpt-oss", "so 1 of them are context and not learned"),
        ("DeepSeek-R1", "in 1 the answer does not begin as the template's generation prompt does"),
    ],
)
def test_turns_that_are_not_learned_are_counted(tmp_path, caplog, shape, words):
    """One line of the log has the numbers, and the encoded row has them."""
    _, _, (row,) = encoded(tmp_path, SHAPES[shape][0], TWO)
    assert words in caplog.text and "chat.jsonl:1" in caplog.text
    assert row.turns_unlearned == 1


@pytest.mark.parametrize("shape", ["ChatML", "Llama 3", "Gemma", "Mistral"])
def test_where_every_turn_is_learned_nothing_is_said(tmp_path, caplog, shape):
    """A log that speaks of every chat would not be read."""
    _, _, (row,) = encoded(tmp_path, SHAPES[shape][0], TWO)
    assert not caplog.text and row.turns_unlearned == 0


def test_calls_after_the_last_question_are_learned_with_it(tmp_path):
    """Under Qwen3 the thinking between calls stays: both turns after the question are learned."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [
        *TWO[:3],
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    _, tokenizer, (row,) = encoded(tmp_path, QWEN3, chat)
    assert row.turns_unlearned == 1
    assert split_text(row, tokenizer)[1] == (
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        "<|im_end|>\n<think>\n\n</think>\n\ntwo<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (GEMMA, SYSTEM, "System role not supported"),
        (MISTRAL, [TWO[0], *TWO[:2]], "must alternate"),
        ("{{ messages | length }}", TWO, "rewrites what stands before the last one"),
        ("{{ messages[0].content.nothing() }}", TWO, "has no attribute"),
        ("{% for %}", TWO, "refuses"),
    ],
)
def test_a_chat_that_a_template_refuses_is_one_sentence(tmp_path, template, messages, words):
    """The template's own words, the file and the row."""
    with pytest.raises(DataError, match=words) as raised:
        encoded(tmp_path, template, messages)
    assert "chat.jsonl:1" in str(raised.value) and "\n" not in str(raised.value)


def test_turns_that_nobody_answers_are_counted(tmp_path, caplog):
    """A last question teaches nothing: the chat is read up to the answer before it."""
    _, tokenizer, (row,) = encoded(tmp_path, QWEN3, TWO[:3])
    assert split_text(row, tokenizer)[1] == "<think>\n\n</think>\n\nyo<|im_end|>\n"
    assert "1 go on after the last turn to learn" in caplog.text


def test_fields_that_a_template_does_not_write_are_counted(tmp_path, caplog):
    """Thinking that ChatML leaves out, and an option that it does not know; roles are no fields."""
    chat = [TWO[0], {**TWO[1], "reasoning_content": "hm", "name": "bo"}]
    encoded(tmp_path, CHATML, chat, chat_template_kwargs={"enable_thinking": False})
    for field in ("reasoning_content (in 1)", "name (in 1)", "enable_thinking (in 1)"):
        assert field in caplog.text
    caplog.clear()
    encoded(tmp_path, QWEN3, [TWO[0], {**TWO[1], "reasoning_content": "hm"}])
    assert not caplog.text


def test_options_reach_the_template_and_ours_cannot_be_set(tmp_path):
    """`enable_thinking` is the template's; whether there is a generation prompt is decided here."""
    shout = CHATML.replace("{{ m.content }}", "{{ m.content | upper if loud else m.content }}")
    _, tokenizer, (row,) = encoded(tmp_path, shout, TWO, chat_template_kwargs={"loud": True})
    assert split_text(row, tokenizer)[1] == "YO<|im_end|>\nOK<|im_end|>\n"
    with pytest.raises(DataError, match="'add_generation_prompt'"):
        encoded(tmp_path, shout, TWO, chat_template_kwargs={"add_generation_prompt": True})
