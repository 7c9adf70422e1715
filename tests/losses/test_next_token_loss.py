"""The next-token loss against transformers' own, bit for bit, and its memory."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from melinoe.losses import next_token, next_token_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("denominator", [None, torch.tensor(77), 55.0])
def test_equals_the_librarys_bit_for_bit(dtype, denominator, monkeypatch):
    """Value and gradient, where 51 rows are worked off by nines; prompts count for nothing."""
    monkeypatch.setattr(next_token, "LOGITS_AT_ONCE", 900)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 17, 100, generator=generator).to(dtype)
    labels = torch.randint(0, 100, (3, 17), generator=generator)
    labels[:, :5] = -100
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = next_token_loss(ours, labels, denominator=denominator)
    want = ForCausalLMLoss(theirs, labels, vocab_size=100, num_items_in_batch=denominator)
    (got * 0.7).backward()
    (want * 0.7).backward()
    assert torch.equal(got, want) and torch.equal(ours.grad, theirs.grad)


def test_nothing_to_learn_gives_zero_with_a_gradient_of_zero():
    """A process may get a batch of prompts alone; the library's own mean is no number there."""
    logits = torch.randn(1, 4, 9, requires_grad=True)
    loss = next_token_loss(logits, torch.full((1, 4), -100))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_saves_the_logits_alone_for_the_backward_pass():
    """No log-probabilities: what autograd keeps is the logits' own memory, and small integers."""
    logits = torch.randn(2, 50, 200, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        next_token_loss(logits, torch.ones(2, 50, dtype=torch.int64))
    own = logits.untyped_storage().data_ptr()
    large = [t for t in kept if t.numel() > 1000]
    assert large and all(t.untyped_storage().data_ptr() == own for t in large)


def test_a_head_is_called_for_some_predicted_tokens_at_a_time_and_gives_the_whole_loss(monkeypatch):
    """Four at most of the 22 that count, twice each: for the loss, and again for the gradient."""
    monkeypatch.setattr(next_token, "LOGITS_AT_ONCE", 4 * 100)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(100, 8, generator=generator), torch.randn(100, generator=generator)
    states = torch.randn(2, 17, 8, generator=generator)
    labels = torch.randint(0, 100, (2, 17), generator=generator)
    labels[:, :6] = -100
    seen = []

    def head(rows):
        seen.append(len(rows))
        return torch.nn.functional.linear(rows, weight, bias)

    ours, theirs = states.clone().requires_grad_(), states.clone().requires_grad_()
    got = next_token_loss(ours, labels, head, 100)
    got.backward()
    assert max(seen) == 4 and sum(seen) == 2 * 22
    want = ForCausalLMLoss(torch.nn.functional.linear(theirs, weight, bias), labels, vocab_size=100)
    want.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours.grad, theirs.grad)
