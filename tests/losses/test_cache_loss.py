"""Cache simulation against its recurrence in float64, and against hand work."""

from fractions import Fraction

import pytest
import torch
from loss_checks import agree, packed_batch
from slow_losses import slow_cache_loss, slow_kl, slow_rank_loss

from melinoe.cache.policy import LRU
from melinoe.cache.residency import Residency
from melinoe.losses import (
    CausalFilter,
    cache_simulation_loss,
    choices_of,
    completion_positions,
    kl_anchor_loss,
    rank_matching_loss,
    segments_of,
)


@pytest.mark.parametrize("form", ["clipped", "literal", "resident"])
@pytest.mark.parametrize(("experts", "top_k"), [(5, 1), (6, 2), (11, 4)])
def test_every_form_equals_its_formula_for_any_number_of_experts(experts, top_k, form):
    """Packed, padded, with skip slots (an id past the experts, and -1) and a skip logit."""
    logits, index, mask, segments = packed_batch(experts, 19, experts, top_k)
    logits = torch.cat([logits, logits[..., :1]], dim=-1)  # a last logit that is no expert
    index[0, ::4, 0], index[1, ::5, -1] = experts, -1
    capacity = top_k + 1 if form == "resident" else top_k + 1.13
    filter_ = CausalFilter.of(segments, 0.8, chunk=5)
    options = {"form": form, "num_experts": experts}
    agree(
        lambda x: slow_cache_loss(x, index, mask, segments, capacity, 0.8, **options),
        lambda x: cache_simulation_loss(x, index, mask, filter_, capacity=capacity, **options),
        logits,
    )


def test_layers_in_one_call_equal_layers_one_by_one():
    """Three layers: one value each, every term, values and gradients.

    Positions of the completion do as well as its mask.
    """
    batches = [packed_batch(seed) for seed in (1, 2, 3)]
    mask, segments = batches[0][2:]
    logits, index = (torch.stack([one[i] for one in batches], dim=2) for i in (0, 1))
    base = logits.flip(2)
    filter_ = CausalFilter.of(segments, 0.9, chunk=4)
    at = completion_positions(mask)

    def cache(x, i):
        return slow_cache_loss(x[:, :, i], index[:, :, i], mask, segments, 3.1, 0.9)

    for slow, fast in (
        (cache, lambda x: cache_simulation_loss(x, index, at, filter_, capacity=3.1)),
        (
            lambda x, i: slow_rank_loss(x[:, :, i], base[:, :, i], mask, 0.1),
            lambda x: rank_matching_loss(x, base.float(), at, rho=0.1),
        ),
        (
            lambda x, i: slow_kl(x[:, :, i], base[:, :, i], mask),
            lambda x: kl_anchor_loss(x, base.float(), at),
        ),
    ):
        agree(lambda x, slow=slow: torch.stack([slow(x, i) for i in range(3)]), fast, logits)


def test_the_resident_form_counts_the_misses_of_an_lru_cache():
    """With gamma .4 it equals a list that keeps the C experts used last, token by token."""
    _, index, _, segments = packed_batch(11, tokens=60, experts=9, top_k=2)
    segments = torch.zeros_like(segments)
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
        CausalFilter.of(segments[:1], 0.4),
        capacity=capacity,
        form="resident",
    )
    assert float(loss) * 60 == pytest.approx(misses)
    assert 0 < misses < 120


@pytest.mark.parametrize("form", ["clipped", "literal"])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 0.9, 1.0])
def test_cache_loss_and_its_gradient_equal_the_recurrence(gamma, form):
    """With packed sequences, padding on both sides and chunks of 4, values and gradients agree."""
    logits, index, mask, segments = packed_batch(3)
    capacity = 3.1  # no ratio of counts makes c exactly 1, where the clip has no gradient
    slow = logits.clone().requires_grad_()
    expected = slow_cache_loss(slow, index, mask, segments, capacity, gamma, form=form)
    expected.backward()
    fast = logits.float().requires_grad_()
    got = cache_simulation_loss(
        fast,
        index,
        mask,
        CausalFilter.of(segments, gamma, chunk=4),
        capacity=capacity,
        form=form,
    )
    got.backward()
    assert got.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(fast.grad.double(), slow.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 23, 128])
def test_chunks_do_not_change_the_filter(chunk):
    """Any chunk length gives what one chunk over everything gives."""
    _, index, _, segments = packed_batch(4)
    whole = CausalFilter.of(segments, 0.8, chunk=23)(choices_of(index, 6))
    torch.testing.assert_close(
        CausalFilter.of(segments, 0.8, chunk=chunk)(choices_of(index, 6)), whole
    )


def test_cache_loss_worked_by_hand():
    """K=1, C=2, gamma=1, choices 0 0 1: first misses whole, second hits (c=2), third has c=0.

    Clipped: 1 + 0 + 1 over 3 tokens. Literal: 1 + (1 - 2) + 1.
    """
    index = torch.tensor([[[0], [0], [1]]])
    logits, mask = torch.zeros(1, 3, 2), torch.ones(1, 3, dtype=torch.bool)
    causal = CausalFilter.of(segments_of(torch.ones(1, 3)), 1.0)

    def loss(form):
        return float(cache_simulation_loss(logits, index, mask, causal, capacity=2, form=form))

    assert loss("clipped") == pytest.approx(2 / 3)
    assert loss("literal") == pytest.approx(1 / 3)


def test_forgetting_worked_by_hand():
    """K=1, C=1, gamma=.5, choices 0 1 0: before the third, s = (.5, 1), so c0 = 1/3, loss 2/3."""
    index = torch.tensor([[[0], [1], [0]]])
    mask = torch.tensor([[False, False, True]])
    causal = CausalFilter.of(torch.zeros(1, 3, dtype=torch.int64), 0.5)
    loss = cache_simulation_loss(torch.zeros(1, 3, 2), index, mask, causal, capacity=1)
    assert float(loss) == pytest.approx(2 / 3)


def test_perfect_reuse_costs_nothing_when_clipped_and_pays_when_literal():
    """The same K=2 of C=4 each time: c = 2 on both, so 0 clipped and K - C = -2 literal."""
    index = torch.tensor([1, 3]).expand(1, 40, 2)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 0] = False  # meets an empty cache
    causal = CausalFilter.of(torch.zeros(1, 40, dtype=torch.int64), 0.9)
    logits = torch.zeros(1, 40, 8)
    clipped = cache_simulation_loss(logits, index, mask, causal, capacity=4)
    literal = cache_simulation_loss(logits, index, mask, causal, capacity=4, form="literal")
    assert float(clipped) == pytest.approx(0.0, abs=1e-6)
    assert float(literal) == pytest.approx(-2.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_clipped_loss_is_between_zero_and_top_k(seed):
    """A token cannot miss fewer than none or more than all of its experts."""
    logits, index, mask, segments = packed_batch(seed)
    causal = CausalFilter.of(segments, 0.9)
    loss = float(cache_simulation_loss(logits, index, mask, causal, capacity=3))
    assert 0.0 <= loss <= index.shape[-1]


@pytest.mark.parametrize("gamma", [0.9, 0.999, 1.0])
def test_long_sequences_stay_exact(gamma):
    """After 4,096 tokens the float32 filter equals a float64 running sum."""
    g = torch.Generator().manual_seed(0)
    index = torch.rand(1, 4096, 16, generator=g).topk(4).indices
    hard = choices_of(index, 16)
    s = CausalFilter.of(torch.zeros(1, 4096, dtype=torch.int64), gamma)(hard)
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
    causal = CausalFilter.of(torch.zeros(1, len(index), dtype=torch.int64), gamma)
    options = {"capacity": capacity, "form": "resident"}
    loss = cache_simulation_loss(
        torch.zeros(1, len(index), 8), index[None], mask, causal, **options
    )
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
