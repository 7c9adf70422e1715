"""The losses against slow float64 transcriptions of their definitions, and against hand work."""

import math

import pytest
import torch

from melinoe.losses import (
    CausalFilter,
    cache_simulation_loss,
    choices_of,
    kl_anchor_loss,
    rank_matching_loss,
    segments_of,
)

# ---- slow and literal: the recurrences token by token, in float64 ----


def slow_cache_loss(logits, top_k_index, mask, segments, capacity, gamma, form, through_cache):
    """Z(t+1) = gamma Z(t) + K / C;  c(t+1) = (gamma Z(t) c(t) + r(t)) / Z(t+1), row by row."""
    total, count = logits.new_zeros(()), 0
    for row in range(logits.shape[0]):
        z, c, current = 0.0, torch.zeros(logits.shape[-1], dtype=torch.float64), None
        for t in range(logits.shape[1]):
            segment = int(segments[row, t])
            if segment == -1:
                continue
            if segment != current:
                z, c, current = 0.0, torch.zeros(logits.shape[-1], dtype=torch.float64), segment
            p = logits[row, t].softmax(-1)
            hard = torch.zeros_like(p)
            for expert in top_k_index[row, t].tolist():
                hard[expert] = 1.0
            r = hard + p - p.detach()
            missing = 1 - c
            if form == "clipped":
                missing = torch.where(missing > 0, missing, torch.zeros_like(missing))
            if mask[row, t]:
                total, count = total + (r * missing).sum(), count + 1
            z_next = gamma * z + top_k_index.shape[-1] / capacity
            c = (gamma * z * c + (r if through_cache else r.detach())) / z_next
            z = z_next
    return total / max(1, count)


def slow_rank_loss(logits, base, mask, rho, reduce):
    """Every ordered pair of experts, one by one."""
    experts, total, count = logits.shape[-1], logits.new_zeros(()), 0
    for row in range(logits.shape[0]):
        for t in range(logits.shape[1]):
            if not mask[row, t]:
                continue
            p, b = logits[row, t].softmax(-1), base[row, t].softmax(-1)
            for i in range(experts):
                for j in range(experts):
                    if b[i] > b[j]:
                        total = total + torch.relu(rho - (p[i] - p[j]))
            count += 1
    pairs = experts * (experts - 1) / 2 if reduce == "mean" else 1
    return total / count / pairs


def packed_batch(seed, tokens=23, experts=6, top_k=2):
    """Two rows: two packed sequences and padding on the right; one sequence with left padding."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, tokens, experts, dtype=torch.float64, generator=g)
    # Not the top of the logits: what ran may have been chosen by other scores.
    index = torch.rand(2, tokens, experts, generator=g).topk(top_k).indices
    segments = torch.zeros(2, tokens, dtype=torch.int64)
    segments[0, 9:18], segments[0, 18:], segments[1, :3] = 1, -1, -1
    mask = torch.rand(2, tokens, generator=g) < 0.6
    return logits, index, mask & (segments >= 0), segments


@pytest.mark.parametrize("through_cache", [False, True])
@pytest.mark.parametrize("form", ["clipped", "literal"])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 0.9, 1.0])
def test_cache_loss_and_its_gradient_equal_the_recurrence(gamma, form, through_cache):
    """With packed sequences, padding on both sides and chunks of 4, values and gradients agree."""
    logits, index, mask, segments = packed_batch(3)
    capacity = 3.1  # no ratio of counts makes c exactly 1, where the clip has no gradient
    slow = logits.clone().requires_grad_()
    expected = slow_cache_loss(slow, index, mask, segments, capacity, gamma, form, through_cache)
    expected.backward()
    fast = logits.float().requires_grad_()
    got = cache_simulation_loss(
        fast,
        index,
        mask,
        CausalFilter.of(segments, gamma, chunk=4),
        capacity=capacity,
        form=form,
        cache_gradient=through_cache,
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


def test_what_stands_in_padding_does_not_matter():
    """Changing ids and logits on padding changes neither value nor gradient elsewhere."""
    logits, index, mask, segments = packed_batch(7)
    causal = CausalFilter.of(segments, 0.9)

    def value_and_gradient(logits, index):
        leaf = logits.float().requires_grad_()
        loss = cache_simulation_loss(leaf, index, mask, causal, capacity=3, cache_gradient=True)
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


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("pairs_at_once", [1, 100, 1 << 24])
def test_rank_loss_and_its_gradient_equal_all_pairs_one_by_one(reduce, pairs_at_once):
    """Ties in the base order included; the chunk size changes nothing."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 5, 7, dtype=torch.float64, generator=g)
    base = logits + torch.randn(2, 5, 7, dtype=torch.float64, generator=g)
    base[..., 3] = base[..., 2]
    mask = torch.rand(2, 5, generator=g) < 0.7
    slow = logits.clone().requires_grad_()
    expected = slow_rank_loss(slow, base, mask, 0.1, reduce)
    expected.backward()
    fast = logits.float().requires_grad_()
    got = rank_matching_loss(
        fast, base.float(), mask, rho=0.1, reduce=reduce, pairs_at_once=pairs_at_once
    )
    got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(fast.grad.double(), slow.grad, atol=1e-6, rtol=1e-4)


def test_rank_loss_worked_by_hand():
    """Base prefers 0 to 1; p = (.5, .5) breaks the margin of .1 by all of it: the loss is .1."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    logits, base = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]])
    assert float(rank_matching_loss(logits, base, mask, rho=0.1)) == pytest.approx(0.1)


def test_kl_anchor_worked_by_hand():
    """p_b = (3/4, 1/4) against uniform: 3/4 ln(3/2) + 1/4 ln(1/2); 0 against itself."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    base = torch.tensor([[[math.log(3.0), 0.0]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(kl_anchor_loss(torch.zeros(1, 1, 2), base, mask)) == pytest.approx(expected)
    assert float(kl_anchor_loss(base, base, mask)) == pytest.approx(0.0, abs=1e-7)


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
