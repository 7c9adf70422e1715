"""Rank matching against slow float64 loops, and hand work."""

import pytest
import torch
from loss_checks import agree
from slow_losses import slow_rank_loss

from melinoe.losses import rank, rank_matching_loss


@pytest.mark.parametrize("pairs_at_once", [1, 100, 1 << 24])
@pytest.mark.parametrize("rho", [0.0, 0.02, 0.1, 0.3, 1.5])
@pytest.mark.parametrize("experts", [2, 7, 20])
def test_the_loss_and_its_gradient_equal_all_pairs_one_by_one(
    experts, rho, pairs_at_once, monkeypatch
):
    """Ties in the base order included, from two to all experts; chunk sizes change nothing."""
    monkeypatch.setattr(rank, "_PAIRS_AT_ONCE", pairs_at_once)
    g = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(2, 5, experts, dtype=torch.float64, generator=g)
    base = logits + torch.randn(2, 5, experts, dtype=torch.float64, generator=g)
    base[0, :, -1] = base[0, :, 0]
    base[1, 2], base[1, 3, : experts // 2] = 0.0, 1.0
    mask = torch.rand(2, 5, generator=g) < 0.8
    agree(
        lambda x: slow_rank_loss(x, base, mask, rho),
        lambda x: rank_matching_loss(x, base.float(), mask, rho=rho),
        logits,
    )


def test_experts_that_reach_rho_exactly_are_counted():
    """Ten equal experts of p = .1 and rho = .1: each misses its margin to none of p = 0.

    Base order 0 > 1 > ... > 19: the 45 pairs among the ten lack .1 each; the 45 among the rest
    lack .1 each; the 100 pairs between the two groups are .1 apart and lack nothing.
    """
    logits = torch.full((1, 1, 20), -200.0)
    logits[..., :10] = 0.0
    base = -torch.arange(20.0)[None, None]
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss = rank_matching_loss(logits, base, mask, rho=0.1)
    assert float(loss) == pytest.approx(9.0 / 190, abs=1e-6)  # 20 x 19 / 2 pairs


def test_rank_loss_worked_by_hand():
    """Base prefers 0 to 1; p = (.5, .5) breaks the margin of .1 by all of it: the loss is .1."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    logits, base = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]])
    assert float(rank_matching_loss(logits, base, mask, rho=0.1)) == pytest.approx(0.1)
