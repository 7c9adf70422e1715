"""Perplexity and exact match: against sums by hand, the model's own loss, and worked answers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from small_olmoe import tiny_model as small_olmoe

from melinoe import attach
from melinoe.data import Encoded
from melinoe.errors import DataError, ModelError
from melinoe.evaluate import (
    Perplexity,
    perplexity,
    perplexity_increase,
    quality_record,
)

tiny_model = partial(small_olmoe, initializer_range=0.02, eos_token_id=1)


def texts(count=5, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(4, 12, count):
        ids = rng.integers(2, 32, length).tolist()
        found.append(Encoded(ids, [False] * 2 + [True] * (len(ids) - 2)))
    return found


class Fixed(torch.nn.Module):
    """Gives every next token the same probabilities."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids, attention_mask, use_cache):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_perplexity_is_worked_by_hand():
    """Completion tokens 1, 1 of probability 1/4 and 2 of 1/2: exp of the mean loss, 2 ** (5/3)."""
    model = Fixed([0.25, 0.25, 0.5])
    result = perplexity(
        model, [Encoded([0, 1, 1], [False, True, True]), Encoded([1, 2], [False, True])]
    )
    assert result.tokens.tolist() == [2, 1]
    assert result.nll == pytest.approx([2 * math.log(4), math.log(2)])
    assert result.estimate.mean == pytest.approx(2 ** (5 / 3))
    assert result.estimate.n == 2


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    """Every one of 8 tokens as likely: perplexity 8 with no width, on any text."""
    estimate = perplexity(Fixed([1 / 8] * 8), [Encoded([1, 2, 3], [True] * 3)] * 3).estimate
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((8, 8, 8))


def test_the_whole_text_counts_all_but_the_first_token():
    """Of 3 and 2 tokens, 2 and 1 have something before them."""
    encoded = [Encoded([0, 1, 1], [False, True, True]), Encoded([1, 2], [False, True])]
    result = perplexity(Fixed([0.25, 0.25, 0.5]), encoded)
    assert result.tokens.tolist() == [2, 1]


def test_it_agrees_with_the_models_own_loss():
    """One sequence, whole text: transformers' loss with labels is our mean."""
    model, encoded = tiny_model(), texts(1)
    ids = torch.tensor([encoded[0].input_ids])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    encoded[0] = Encoded(encoded[0].input_ids, [False] + [True] * (len(encoded[0]) - 1))
    found = perplexity(model, encoded)
    assert math.log(found.estimate.mean) == pytest.approx(expected, rel=1e-6)


def test_padding_and_batching_change_nothing():
    """Five texts of different lengths cost the same one by one and all together."""
    model, encoded = tiny_model(), texts()
    alone, together = perplexity(model, encoded, 1), perplexity(model, encoded, 5)
    assert np.array_equal(alone.tokens, together.tokens)
    assert alone.nll == pytest.approx(together.nll, rel=1e-5)


def test_an_offloaded_model_has_exactly_the_perplexity_of_the_resident_one():
    """Three slots of eight against all eight and against the plain model: equal to the bit."""
    model, encoded = tiny_model(), texts()
    plain = perplexity(model, encoded, 2)
    found = {}
    for slots in (3, 8):
        handle = attach(model, slots=slots)
        found[slots] = perplexity(model, encoded, 2)
        assert (handle.counters.loads.sum() > 0) or slots == 8
        handle.detach()
    assert np.array_equal(found[3].nll, found[8].nll)
    assert np.array_equal(found[3].nll, plain.nll)


def test_the_training_mode_is_put_back():
    """Evaluating in the middle of training leaves dropout on."""
    model = tiny_model().train()
    perplexity(model, texts(1))
    assert model.training


def test_an_increase_is_paired():
    """Ours loses .1 nat more on every token of every text: exp(.1) - 1, with no width."""
    theirs = Perplexity(np.asarray([10.0, 3.0, 40.0]), np.asarray([5.0, 4.0, 9.0]))
    ours = Perplexity(theirs.nll + 0.1 * theirs.tokens, theirs.tokens)
    estimate = perplexity_increase(ours, theirs)
    wanted = math.exp(0.1) - 1
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((wanted,) * 3)


def test_different_texts_are_not_compared():
    """Other token counts mean another text."""
    with pytest.raises(DataError, match="different texts"):
        perplexity_increase(
            Perplexity(np.asarray([1.0]), np.asarray([2.0])),
            Perplexity(np.asarray([1.0]), np.asarray([3.0])),
        )


def test_no_text_is_refused():
    """An empty set has no perplexity."""
    with pytest.raises(DataError, match="at least one example"):
        perplexity(tiny_model(), [])


def test_text_with_nothing_to_predict_is_refused():
    """A single token has nothing before it."""
    with pytest.raises(DataError, match="longer examples"):
        perplexity(tiny_model(), [Encoded([3], [True])])


def test_a_loss_that_is_not_finite_names_the_example():
    """A nan in the embedding of token 9 shows up as the one example that holds it."""
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    encoded = [Encoded([3, 4, 5], [False, True, True]), Encoded([3, 9, 5], [False, True, True])]
    with pytest.raises(ModelError, match="example 1"):
        perplexity(model, encoded, batch_size=1)


def test_a_quality_record_holds_what_reports_read():
    """Perplexity 2 ** (5/3) of three tokens of mathematics."""
    result = Perplexity(np.asarray([2 * math.log(4), math.log(2)]), np.asarray([2.0, 1.0]))
    record = quality_record(result, "base", "gsm8k", True)
    assert record["kind"] == "quality" and record["tokens"] == 3
    assert record["perplexity"]["mean"] == pytest.approx(2 ** (5 / 3))
    assert (record["model"], record["domain"], record["in_domain"]) == ("base", "gsm8k", True)
