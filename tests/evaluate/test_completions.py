"""Completions, their references, and ROUGE-L: against hand-worked texts and one-by-one decoding."""

from itertools import pairwise

import pytest
import torch
from small_olmoe import tiny_model, words_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from melinoe import attach
from melinoe.data import Example
from melinoe.errors import DataError
from melinoe.evaluate import complete, reference, rouge_l
from melinoe.generate import generate

WORDS = ["<pad>", "<eos>", "Question:", "a", "b", "c", "d", "e", "f", "Answer:"]


def successor_model(order, context=64):
    """Each word is followed by the next one of *order*, whatever stood before; see the weights."""
    size = 16
    model = tiny_model(
        vocab_size=size, intermediate_size=4, num_hidden_layers=1, num_experts=4, eos_token_id=1,
        max_position_embeddings=context,
    )  # fmt: skip
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.experts.down_proj.zero_()
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for word, following in pairwise(order):
            model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 1
    return model


def word_tokenizer():
    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def question(text, answer="a"):
    return Example(f"Question: {text} Answer: {text}", f" {answer}", "here:1", answer=answer)


def test_a_question_ends_at_the_next_question():
    """From a the model writes b c Question: d: only b c is the answer; from c nothing is."""
    model = successor_model(["a", "b", "c", "Question:", "d", "e", "f", "a"])
    examples = [question("a"), question("c"), question("b")]
    texts = complete(model, word_tokenizer(), examples, max_new_tokens=12)
    assert [text.split() for text in texts] == [["b", "c"], [], ["c"]]


def test_a_prompt_that_is_no_question_runs_on():
    """The same words after a plain prompt are part of what is written."""
    model = successor_model(["a", "b", "c", "Question:", "d", "e", "f", "a"])
    texts = complete(model, word_tokenizer(), [Example("a", "b", "here:1")], max_new_tokens=5)
    assert texts[0].split() == ["b", "c", "Question:", "d", "e"]


def test_end_of_text_ends_a_completion():
    """f ends the text; the other row of the batch goes on, and padding is no part of either."""
    model = successor_model(["a", "b", "c", "d", "e", "f", "<eos>"])
    examples = [Example("e", "f", "here:1"), Example("a a a", "b", "here:2")]
    texts = complete(model, word_tokenizer(), examples, max_new_tokens=4)
    assert [text.split() for text in texts] == [["f"], ["b", "c", "d", "e"]]


def test_a_batch_writes_what_each_prompt_alone_would():
    """Prompts of 1 to 9 words in batches of 4, and one by one through `generate`."""
    model, tokenizer = tiny_model(), words_tokenizer()
    examples = [
        Example(" ".join(f"w{2 + (5 * n + k) % 30}" for k in range(n)), "w2", f"here:{n}")
        for n in range(1, 10)
    ]
    together = complete(model, tokenizer, examples, max_new_tokens=6, batch_size=4)
    alone = [generate(model, None, tokenizer, e.prompt, 6).text for e in examples]
    assert together == alone
    assert len(set(alone)) > 5  # else equality would show little


def test_an_offloaded_model_writes_the_same():
    """Two slots of eight against all eight, batch for batch."""
    model, tokenizer = tiny_model(), words_tokenizer()
    examples = [Example(f"w{i} w{i + 1}", "w2", f"here:{i}") for i in range(2, 12)]
    plain = complete(model, tokenizer, examples, 8, batch_size=4)
    handle = attach(model, slots=2)
    assert complete(model, tokenizer, examples, 8, batch_size=4) == plain
    assert handle.counters.loads.sum() > 0


def test_a_completion_stays_inside_the_context(caplog):
    """Of a context of 16, a prompt of 13 leaves three tokens, and it is said; 16 leave none."""
    model = successor_model(["a", "b", "a"], context=16)
    texts = complete(model, word_tokenizer(), [Example("a " * 13, "b", "x:1")], 8)
    assert texts[0].split() == ["b", "a", "b"]
    assert "leave less than 8 tokens" in caplog.text
    with pytest.raises(DataError, match="x:2 has a prompt of 16 tokens"):
        complete(model, word_tokenizer(), [Example("a " * 16, "b", "x:2")], 8)


def test_nothing_to_complete_is_refused():
    """No examples; a prompt without a token."""
    with pytest.raises(DataError, match="at least one"):
        complete(tiny_model(), words_tokenizer(), [])
    with pytest.raises(DataError, match="empty prompt"):
        complete(tiny_model(), words_tokenizer(), [Example("", "w2", "x:1")])
    with pytest.raises(ValueError):
        complete(tiny_model(), words_tokenizer(), [Example("w2", "w2", "x:1")], batch_size=0)


def test_references_are_what_should_have_been_written():
    """The answer, the completion, or a chat's last assistant turn; plain text has none."""
    chat = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", " 4 ")]
    turns = tuple({"role": role, "content": text} for role, text in chat)
    assert reference(question("a", "c #### 3")) == "c #### 3"
    assert reference(Example("a", " b\n", "x")) == "b"
    assert reference(Example("", "", "x", messages=turns)) == "4"
    with pytest.raises(DataError, match="x is plain text"):
        reference(Example("", "all of it", "x"))


def test_rouge_l_is_worked_by_hand():
    """Common subsequence "the cat on mat": 4 of 6 and 4 of 5 words, F1 = 8 / 11."""
    assert rouge_l(["the cat lay on mat"], ["The cat sat on the mat."])[0] == pytest.approx(8 / 11)


def test_rouge_l_stems():
    """Running and runs are one word, dogs and dog too."""
    assert rouge_l(["runs dog"], ["Running dogs"])[0] == 1


def test_rouge_l_of_silence_is_zero_and_of_no_words_is_refused():
    """An empty completion is wrong; a reference without words measures nothing."""
    assert rouge_l(["", "β"], ["word", "word"]).tolist() == [0, 0]
    with pytest.raises(DataError, match="reference 1"):
        rouge_l(["a", "b"], ["a", "βγ"])
    with pytest.raises(DataError):
        rouge_l([], [])
    with pytest.raises(ValueError):
        rouge_l(["a"], [])


def test_a_checkpoints_own_generation_settings_change_no_completion():
    """Penalties on what was said already belong to a chat, not to a measurement of the model."""
    model = tiny_model()
    tokenizer = words_tokenizer()
    examples = [Example(f"w{i}", "w5", f"x:{i}") for i in range(3, 8)]
    expected = complete(model, tokenizer, examples, 12)
    config = model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.min_new_tokens = 3.0, 2, 12
    assert complete(model, tokenizer, examples, 12) == expected
