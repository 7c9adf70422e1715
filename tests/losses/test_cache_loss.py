"""Cache simulation against its recurrence in float64, and against hand work."""

from fractions import Fraction

import pytest
import torch
from loss_checks import agree, padded_batch
from slow_losses import slow_cache_loss

from melinoe.cache.policy import LRU
from melinoe.cache.residency import Residency
from melinoe.losses import (
    cache_simulation_loss,
    choices_of,
    completion_positions,
    filtered,
)


@pytest.mark.parametrize("form", ["clipped", "literal", "resident"])
@pytest.mark.parametrize(("experts", "top_k"), [(5, 1), (6, 2), (11, 4)])
def test_every_form_equals_its_formula_for_any_number_of_experts(experts, top_k, form):
    """Padded, with skip slots (an id past the experts, and -1) and a skip logit."""
    logits, index, mask = padded_batch(experts, 19, experts, top_k)
    logits = torch.cat([logits, logits[..., :1]], dim=-1)  # a last logit that is no expert
    index[0, ::4, 0], index[1, ::5, -1] = experts, -1
    capacity = top_k + 1 if form == "resident" else top_k + 1.13
    options = {"form": form, "num_experts": experts}
    agree(
        lambda x: slow_cache_loss(x, index, mask, capacity, 0.8, **options),
        lambda x: cache_simulation_loss(x, index, mask, gamma=0.8, capacity=capacity, **options),
        logits,
    )


def test_layers_in_one_call_equal_layers_one_by_one():
    """Three layers: one value each, and gradients; positions do as well as a mask."""
    batches = [padded_batch(seed) for seed in (1, 2, 3)]
    mask, at = batches[0][2], completion_positions(batches[0][2])
    logits, index = (torch.stack([one[i] for one in batches], dim=2) for i in (0, 1))

    def slow(x):
        each = [slow_cache_loss(x[:, :, i], index[:, :, i], mask, 3.1, 0.9) for i in range(3)]
        return torch.stack(each)

    agree(slow, lambda x: cache_simulation_loss(x, index, at, gamma=0.9, capacity=3.1), logits)


def test_the_resident_form_counts_the_misses_of_an_lru_cache():
    """With gamma .4 it equals a list that keeps the C experts used last, token by token."""
    _, index, _ = padded_batch(11, tokens=60, experts=9, top_k=2)
    capacity, misses, recent = 4, 0, []
    for t in range(60):
        ids = index[0, t].tolist()
        misses += sum(e not in recent[:capacity] for e in ids)
        # Of two used by one token, the one used later before that; of new ones, the lower id.
        ids.sort(key=lambda e: (recent.index(e) if e in recent else 99, e))
        recent = ids + [e for e in recent if e not in ids]
    loss = cache_simulation_loss(
        torch.zeros(1, 60, 9),
        index[:1],
        torch.ones(1, 60, dtype=torch.bool),
        gamma=0.4,
        capacity=capacity,
        form="resident",
    )
    assert float(loss) * 60 == pytest.approx(misses)
    assert 0 < misses < 120


@pytest.mark.parametrize("form", ["clipped", "literal"])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 0.9, 1.0])
def test_cache_loss_and_its_gradient_equal_the_recurrence(gamma, form):
    """With padding, values and gradients agree."""
    logits, index, mask = padded_batch(3)
    capacity = 3.1  # no ratio of counts makes c exactly 1, where the clip has no gradient
    slow = logits.clone().requires_grad_()
    expected = slow_cache_loss(slow, index, mask, capacity, gamma, form=form)
    expected.backward()
    fast = logits.float().requires_grad_()
    got = cache_simulation_loss(
        fast,
        index,
        mask,
        gamma=gamma,
        capacity=capacity,
        form=form,
    )
    got.backward()
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(fast.grad.double(), slow.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 23, 128])
def test_chunks_do_not_change_the_filter(chunk):
    """Any chunk length gives what one chunk over everything gives."""
    hard = choices_of(padded_batch(4)[1], 6)
    whole = filtered(hard, 0.8, chunk=23)
    torch.testing.assert_close(filtered(hard, 0.8, chunk=chunk), whole)


def test_cache_loss_worked_by_hand():
    """K=1, C=2, gamma=1, choices 0 0 1: first misses whole, second hits (c=2), third has c=0.

    Clipped: 1 + 0 + 1 over 3 tokens. Literal: 1 + (1 - 2) + 1.
    """
    index = torch.tensor([[[0], [0], [1]]])
    logits, mask = torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)

    def loss(form):
        options = {"gamma": 1.0, "capacity": 2, "form": form}
        return float(cache_simulation_loss(logits, index, mask, **options))

    assert loss("clipped") == pytest.approx(2 / 3)
    assert loss("literal") == pytest.approx(1 / 3)


def test_forgetting_worked_by_hand():
    """K=1, C=1, gamma=.5, choices 0 1 0: before the third, s = (.5, 1), so c0 = 1/3, loss 2/3."""
    index = torch.tensor([[[0], [1], [0]]])
    mask = torch.tensor([[False, False, True]])
    loss = cache_simulation_loss(torch.zeros(1, 3, 2), index, mask, gamma=0.5, capacity=1)
    assert float(loss) == pytest.approx(2 / 3)


def test_perfect_reuse_costs_nothing_when_clipped_and_pays_when_literal():
    """The same K=2 of C=4 each time: c = 2 on both, so 0 clipped and K - C = -2 literal."""
    index = torch.tensor([1, 3]).expand(1, 40, 2)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 0] = False  # meets an empty cache
    given = (torch.zeros(1, 40, 8), index, mask)
    clipped = cache_simulation_loss(*given, gamma=0.9, capacity=4)
    literal = cache_simulation_loss(*given, gamma=0.9, capacity=4, form="literal")
    assert float(clipped) == pytest.approx(0.0, abs=1e-6)
    assert float(literal) == pytest.approx(-2.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_clipped_loss_is_between_zero_and_top_k(seed):
    """A token cannot miss fewer than none or more than all of its experts."""
    logits, index, mask = padded_batch(seed)
    loss = float(cache_simulation_loss(logits, index, mask, gamma=0.9, capacity=3))
    assert 0.0 <= loss <= index.shape[-1]


@pytest.mark.parametrize("gamma", [0.9, 0.999, 1.0])
def test_long_sequences_stay_exact(gamma):
    """After 4,096 tokens the float32 filter equals a float64 running sum."""
    g = torch.Generator().manual_seed(0)
    index = torch.rand(1, 4096, 16, generator=g).topk(4).indices
    hard = choices_of(index, 16)
    s = filtered(hard, gamma)
    state = torch.zeros(16, dtype=torch.float64)
    for t in range(4095):
        state = gamma * state + hard[0, t].double()
    torch.testing.assert_close(s[0, -1].double(), state, rtol=2e-6, atol=1e-5)


def misses_of(index, capacity, gamma):
    """Of one sequence, what a cache misses that keeps the *capacity* experts ordered first.

    Order: by uses that count gamma less with each token, in exact fractions; never used: not there.
    """
    counts, misses = {}, 0
    for chosen in index.tolist():
        order = sorted(counts, key=lambda e: (-counts[e], e))[:capacity]
        misses += len(set(chosen) - set(order))
        counts = {e: gamma * n for e, n in counts.items()}
        for expert in chosen:
            counts[expert] = counts.get(expert, 0) + 1
    return misses


def lru_misses(index, capacity):
    """Of one sequence, by the simulator's own LRU."""
    cache, misses = Residency(8, capacity, LRU()), 0
    for chosen in index.tolist():
        misses += len(cache.request(sorted(chosen)).loads)
    return misses


def counted(index, capacity, gamma):
    """What the loss counts on one sequence, as a number of misses."""
    mask = torch.ones(1, len(index), dtype=torch.bool)
    options = {"gamma": gamma, "capacity": capacity, "form": "resident"}
    loss = cache_simulation_loss(torch.zeros(1, len(index), 8), index[None], mask, **options)
    return round(loss.item() * len(index), 3)


def test_with_one_expert_a_token_the_count_is_any_lrus():
    """No two experts were used last by the same token."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(8, (60, 1), generator=generator)
    assert counted(index, 3, 0.4) == lru_misses(index, 3)


def test_with_more_the_count_is_that_of_the_rule_and_no_other_lrus():
    """Twenty sequences: the rule's count in all, ours of the simulator in some only."""
    same = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        index = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(40)])
        assert counted(index, 3, 0.4) == misses_of(index, 3, Fraction(2, 5))
        same.append(counted(index, 3, 0.4) == lru_misses(index, 3))
    assert not all(same)


def test_an_expert_unused_for_long_is_still_resident():
    """A gap of 1,300 tokens at gamma .9 falls below the smallest float; there is room for both."""
    index = torch.ones(1301, 1, dtype=torch.int64)
    index[0], index[-1] = 0, 0
    assert counted(index, 2, 0.9) == 2  # the first uses of 0 and of 1
    index[-1] = 2
    assert counted(index, 2, 0.9) == 3  # never used: not there
