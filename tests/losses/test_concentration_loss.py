"""Concentration against its formula in float64, and against hand work."""

import math

import pytest
import torch
from loss_checks import agree, padded_batch
from slow_losses import slow_concentration_loss

from melinoe.losses import completion_positions, concentration_loss

EXPERTS = 8


@pytest.mark.parametrize(("experts", "top_k", "capacity"), [(5, 1, 2), (6, 2, 2), (11, 4, 5.5)])
def test_concentration_equals_its_formula_for_any_number_of_experts(experts, top_k, capacity):
    """Padded, with skip slots (an id past the experts, and -1) and a skip logit."""
    logits, index, mask = padded_batch(experts, 19, experts, top_k)
    logits = torch.cat([logits, logits[..., :1]], dim=-1)  # a last logit that is no expert
    index[0, ::4, 0], index[1, ::5, -1] = experts, -1
    agree(
        lambda x: slow_concentration_loss(x, index, mask, capacity, num_experts=experts),
        lambda x: concentration_loss(x, index, mask, capacity=capacity, num_experts=experts),
        logits,
    )


def test_layers_in_one_call_and_positions_equal_layers_one_by_one():
    """Two layers, one value each; positions of the completion do as well as its mask."""
    batches = [padded_batch(seed) for seed in (1, 2)]
    mask = batches[0][2]
    logits, index = (torch.stack([one[i] for one in batches], dim=2) for i in (0, 1))
    agree(
        lambda x: torch.stack(
            [slow_concentration_loss(x[:, :, i], index[:, :, i], mask, 2) for i in (0, 1)]
        ),
        lambda x: concentration_loss(x, index, completion_positions(mask), capacity=2),
        logits,
    )


def loss_of(choices, capacity=2, **options):
    """Of sequences, one a row, whose tokens choose as written."""
    index = torch.tensor(choices)
    shape = index.shape[:2]
    logits = torch.zeros(*shape, EXPERTS, requires_grad=True)
    mask = torch.ones(shape, dtype=torch.bool)
    return concentration_loss(logits, index, mask, capacity=capacity, **options)


def test_sequences_with_experts_of_their_own_cost_nothing():
    """Four sequences of two experts each, all eight used alike: nothing to gain."""
    own = [[[2 * row, 2 * row + 1]] * 3 for row in range(4)]
    assert float(loss_of(own).detach()) == pytest.approx(0, abs=1e-6)


def test_the_same_two_experts_for_every_sequence_cost_what_is_left_unused():
    """Concentrated, but log 8 - log 2 of the batch's entropy is missing: 2/3 of log 8."""
    same = [[[0, 1]] * 3 for _ in range(4)]
    assert float(loss_of(same).detach()) == pytest.approx(2 / 3)


def test_all_experts_in_every_sequence_cost_what_the_capacity_lacks():
    """log 8 - log 2 within each sequence; half of a step's tokens count half."""
    every = [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2
    assert float(loss_of(every).detach()) == pytest.approx(1 - math.log(2) / math.log(8))
    half = loss_of(every, denominator=16.0)
    assert float(half.detach()) == pytest.approx(1 / 3)


def test_no_token_that_counts_costs_nothing_and_pulls_nothing():
    """A batch of prompts alone still has a gradient, of zeros."""
    logits = torch.randn(2, 3, 4, EXPERTS, requires_grad=True)
    index = torch.zeros(2, 3, 4, 2, dtype=torch.int64)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = concentration_loss(logits, index, mask, capacity=2)
    assert loss.shape == (4,) and not loss.any()
    loss.sum().backward()
    assert not logits.grad.any()
