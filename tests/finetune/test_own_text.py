"""Text that the base model writes itself: from its own distribution, by a seed, cut at its end."""

import pytest
import torch
from small_olmoe import tiny_model, words_tokenizer

from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.errors import TokenizerError, TrainingError
from melinoe.finetune import finetune
from melinoe.finetune.own_text import SHORTEST, own_text

EOS = 1


def biased_model():
    """Writes token 5 three times as often as token 6, nothing else, whatever came before."""
    model = tiny_model()
    logits = torch.full((32,), -torch.inf)
    logits[5], logits[6] = torch.log(torch.tensor([0.75, 0.25]))

    def always(module, args, output):
        return logits.expand(*output.shape[:-1], -1).clone()

    model.lm_head.register_forward_hook(always)
    return model


def test_tokens_come_from_the_models_own_distribution():
    """Three quarters of some 5,000 tokens are token 5: nothing is cut off or sharpened."""
    texts = own_text(biased_model(), words_tokenizer(), 160, 32)
    tokens = [token for text in texts for token in text.input_ids[1:]]
    assert set(tokens) == {5, 6}
    # Four standard deviations of a share of 4,960 draws are .025.
    assert tokens.count(5) / len(tokens) == pytest.approx(0.75, abs=0.025)


def test_every_token_but_the_first_counts_and_the_length_is_kept():
    """A text begins with end-of-text, for want of a start-of-text token."""
    for text in own_text(biased_model(), words_tokenizer(), 3, 12):
        assert text.input_ids[0] == EOS
        assert len(text) == 12
        assert text.completion_mask == [False] + [True] * 11


def test_the_seed_decides_the_text_and_no_other_generator_moves():
    """Equal seeds agree, others differ, and torch's own generator is where it was."""
    model, tokenizer = tiny_model(), words_tokenizer()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one = own_text(model, tokenizer, 4, 16, seed=3)
    assert torch.rand(1) == expected
    assert own_text(model, tokenizer, 4, 16, seed=3) == one
    assert own_text(model, tokenizer, 4, 16, seed=4) != one


def test_a_text_ends_with_end_of_text_and_padding_is_left_out():
    """End-of-text in a tenth of the draws: texts stop at the first, short ones are left out."""
    model = tiny_model()
    model.generation_config.eos_token_id = EOS
    logits = torch.full((32,), -torch.inf)
    logits[5], logits[EOS] = torch.log(torch.tensor([0.9, 0.1]))
    model.lm_head.register_forward_hook(
        lambda m, a, out: logits.expand(*out.shape[:-1], -1).clone()
    )
    texts = own_text(model, words_tokenizer(), 40, 32)
    assert len(texts) == 40
    assert all(EOS not in text.input_ids[1:-1] for text in texts)
    assert all(SHORTEST <= len(text) <= 32 for text in texts)
    assert any(text.input_ids[-1] == EOS for text in texts)
    assert all(text.input_ids[-1] == EOS or len(text) == 32 for text in texts)


def test_the_model_is_left_as_it_was():
    """Training mode comes back."""
    model = tiny_model().train()
    own_text(model, words_tokenizer(), 1, 8)
    assert model.training


def test_a_tokenizer_without_start_or_end_is_refused():
    """There would be nothing to begin with."""
    tokenizer = words_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TokenizerError, match="cannot write from nothing"):
        own_text(tiny_model(), tokenizer, 1, 8)


def test_a_run_replays_what_its_base_model_writes(checkpoint):
    """The log holds the replay term, and the same run twice gives the same rows."""
    settings = FinetuneSettings(
        steps=2,
        batch_size=2,
        max_length=16,
        learning_rate=1e-2,
        lambda_replay=1.0,
        own_texts=4,
        log_every=1,
    )
    data = [Example("what? ", "a is it.", f"row {i}") for i in range(4)]
    logs = [
        finetune(
            checkpoint / "base", data, checkpoint / str(i), settings, anchor_examples="own"
        ).log
        for i in range(2)
    ]
    replayed = [[row["replay"] for row in log if "replay" in row] for log in logs]
    assert len(replayed[0]) == 2 and all(value > 0 for value in replayed[0])
    assert replayed[0] == replayed[1]


def test_without_anchor_text_the_base_writes_as_much_as_the_run_reads(checkpoint):
    """Two steps of two texts, each as long as the longest example; the record names the text."""
    data = [Example("what? ", "a is it.", f"row {i}") for i in range(4)]
    settings = FinetuneSettings(steps=2, batch_size=2, log_every=1)
    done = finetune(checkpoint / "base", data, checkpoint / "out", settings)
    assert done.metadata["anchor"]["examples"] == 4
    assert all(row["replay"] > 0 for row in done.log)
    off = FinetuneSettings(steps=1, batch_size=2, lambda_replay=0.0)
    assert finetune(checkpoint / "base", data, checkpoint / "off", off).metadata["anchor"] is None


def test_a_base_that_ends_at_once_is_told_of():
    """It would be asked for ever; the message names both ways out."""
    model = tiny_model()
    model.generation_config.eos_token_id = EOS
    logits = torch.full((32,), -torch.inf)
    logits[EOS] = 0.0
    model.lm_head.register_forward_hook(
        lambda m, a, out: logits.expand(*out.shape[:-1], -1).clone()
    )
    with pytest.raises(TrainingError, match="set lambda_replay to 0"):
        own_text(model, words_tokenizer(), 4, 16)
