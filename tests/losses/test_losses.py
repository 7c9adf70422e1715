"""What holds of all losses: padding, packing, skip slots, nothing to learn, the step's mean."""

import pytest
import torch
from loss_checks import packed_batch

from melinoe.losses import (
    CausalFilter,
    cache_simulation_loss,
    choices_of,
    kl_anchor_loss,
    rank_matching_loss,
)


def test_what_stands_in_padding_does_not_matter():
    """Changing ids and logits on padding changes neither value nor gradient elsewhere."""
    logits, index, mask, segments = packed_batch(7)
    causal = CausalFilter.of(segments, 0.9)

    def value_and_gradient(logits, index):
        leaf = logits.float().requires_grad_()
        loss = cache_simulation_loss(leaf, index, mask, causal, capacity=3)
        loss.backward()
        return loss.detach(), leaf.grad

    value, gradient = value_and_gradient(logits, index)
    padding = segments == -1
    logits[padding], index[padding] = 9.0, 0
    again, gradient_again = value_and_gradient(logits, index)
    assert torch.equal(value, again)
    assert torch.equal(gradient[~padding], gradient_again[~padding])
    assert not gradient[padding].any()


def test_packed_sequences_equal_sequences_alone():
    """A sequence packed behind another has the loss it has in a row of its own."""
    logits, index, mask, segments = packed_batch(8)
    alone = slice(9, 18)
    first = mask.clone()
    first[:], first[0, alone] = False, mask[0, alone]
    packed = cache_simulation_loss(
        logits, index, first, CausalFilter.of(segments, 0.9, chunk=4), capacity=3
    )
    single = cache_simulation_loss(
        logits[:1, alone],
        index[:1, alone],
        mask[:1, alone],
        CausalFilter.of(torch.zeros(1, 9, dtype=torch.int64), 0.9),
        capacity=3,
    )
    assert float(packed) == pytest.approx(float(single), abs=1e-6)


def test_skip_slots_are_no_experts():
    """Ids at or past the experts, and -1, leave no mark and cost nothing."""
    index = torch.tensor([[[0, 4], [0, -1]]])
    assert choices_of(index, 4).tolist() == [[[1, 0, 0, 0], [1, 0, 0, 0]]]
    loss = cache_simulation_loss(
        torch.zeros(1, 2, 5),
        index,
        torch.tensor([[False, True]]),
        CausalFilter.of(torch.zeros(1, 2, dtype=torch.int64), 0.9),
        capacity=2,
        num_experts=4,
    )
    assert float(loss) == 0.0  # expert 0 is all the cache has seen, so c_0 = C = 2


def test_no_completion_token_gives_zero_and_no_nan():
    """A batch without completion has loss 0 and gradient 0."""
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    none = torch.zeros(1, 3, dtype=torch.bool)
    causal = CausalFilter.of(torch.zeros(1, 3, dtype=torch.int64), 0.9)
    index = torch.zeros(1, 3, 1, dtype=torch.int64)
    loss = (
        cache_simulation_loss(logits, index, none, causal, capacity=2)
        + rank_matching_loss(logits, logits.detach(), none, rho=0.1)
        + kl_anchor_loss(logits, logits.detach(), none)
    )
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()


def test_denominator_of_the_step_makes_batches_add_up():
    """Two batches divided by their joint token count sum to the loss of both in one batch."""
    logits, index, mask, segments = packed_batch(9)
    base = logits.roll(1, -1)
    count = mask.sum()

    def losses(rows, **kwargs):
        causal = CausalFilter.of(segments[rows], 0.9)
        return (
            cache_simulation_loss(
                logits[rows], index[rows], mask[rows], causal, capacity=3, **kwargs
            )
            + rank_matching_loss(logits[rows], base[rows], mask[rows], rho=0.1, **kwargs)
            + kl_anchor_loss(logits[rows], base[rows], mask[rows], **kwargs)
        )

    parts = losses(slice(0, 1), denominator=count) + losses(slice(1, 2), denominator=count)
    assert float(parts) == pytest.approx(float(losses(slice(0, 2))), rel=1e-5)
