"""What holds of all losses: padding, skip slots, nothing to learn, the step's mean."""

import pytest
import torch
from loss_checks import padded_batch

from melinoe.losses import cache_simulation_loss, choices_of


def test_what_stands_in_padding_does_not_matter():
    """Changing ids and logits on padding changes neither value nor gradient elsewhere."""
    logits, index, mask = padded_batch(7)

    def value_and_gradient(logits, index):
        leaf = logits.float().requires_grad_()
        loss = cache_simulation_loss(leaf, index, mask, gamma=0.9, capacity=3)
        loss.backward()
        return loss.detach(), leaf.grad

    value, gradient = value_and_gradient(logits, index)
    logits[0, -5:], index[0, -5:] = 9.0, 0
    again, gradient_again = value_and_gradient(logits, index)
    assert torch.equal(value, again) and torch.equal(gradient, gradient_again)
    assert not gradient[0, -5:].any() and gradient[0, :-5].any()


def test_skip_slots_are_no_experts():
    """Ids at or past the experts, and -1, leave no mark and cost nothing."""
    index = torch.tensor([[[0, 4], [0, -1]]])
    assert choices_of(index, 4).tolist() == [[[1, 0, 0, 0], [1, 0, 0, 0]]]
    loss = cache_simulation_loss(
        torch.zeros(1, 2, 5),
        index,
        torch.tensor([[False, True]]),
        gamma=0.9,
        capacity=2,
        num_experts=4,
    )
    assert float(loss) == 0.0  # expert 0 is all the cache has seen, so c_0 = C = 2


def test_no_completion_token_gives_zero_and_no_nan():
    """A batch without completion has loss 0 and gradient 0."""
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    none = torch.zeros(1, 3, dtype=torch.bool)
    index = torch.zeros(1, 3, 1, dtype=torch.int64)
    loss = cache_simulation_loss(logits, index, none, gamma=0.9, capacity=2)
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


def test_denominator_of_the_step_makes_batches_add_up():
    """Two batches divided by their joint token count sum to the loss of both in one batch."""
    logits, index, mask = padded_batch(9)
    count = mask.sum()

    def losses(rows, **kwargs):
        return cache_simulation_loss(
            logits[rows], index[rows], mask[rows], gamma=0.9, capacity=3, **kwargs
        )

    parts = losses(slice(0, 1), denominator=count) + losses(slice(1, 2), denominator=count)
    assert float(parts) == pytest.approx(float(losses(slice(0, 2))), rel=1e-5)
