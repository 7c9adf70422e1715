"""Cache-aware choice: against a slow loop, and what must stay as it was."""

import pytest
import torch

from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.moe.choice import CacheAwareChoice, ChoiceSettings, Weighting, find_weighting


def router(logits, top_k):
    """OLMoE's rule: softmax over all, the top-k's probabilities as they are."""
    weights, index = logits.softmax(-1).topk(top_k, dim=-1)
    return index, weights


def expected_set(z, chosen, resident, strength, keep, spread):
    """The experts that one token should use, by loops over plain numbers."""
    experts = range(len(z))
    by_logit = sorted(chosen, key=lambda e: -z[e])
    kept = by_logit[:keep]
    value = {e: z[e] + (strength * spread if resident[e] else 0.0) for e in experts}
    others = sorted((e for e in experts if e not in kept), key=lambda e: -value[e])
    return set(kept) | set(others[: len(chosen) - len(kept)])


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_choices_equal_a_slow_loop(strength, keep):
    """Random logits and caches, one token at a time, over and over."""
    generator = torch.Generator().manual_seed(3)
    choice = CacheAwareChoice(ChoiceSettings("cache-prior", strength, keep), 12)
    earlier = torch.randn(8, 12, generator=generator)
    choice.observe(earlier, *router(earlier, 4))
    spread = None
    for _ in range(60):
        z = torch.randn(1, 12, generator=generator) * 2
        resident = torch.rand(12, generator=generator) < 0.4
        index, weights = router(z, 4)
        now = float(z.max() - z.min())
        spread = now if spread is None else 0.99 * spread + 0.01 * now
        got, given = choice(z, index, weights, resident)
        wanted = expected_set(
            z[0].tolist(), index[0].tolist(), resident.tolist(), strength, keep, spread
        )
        assert set(got[0].tolist()) == wanted
        p = z.softmax(-1)[0]
        assert given[0].tolist() == pytest.approx([float(p[e]) for e in got[0]], rel=1e-4)


def test_strength_zero_and_a_full_cache_change_nothing():
    """Index and weights come back as the same objects."""
    z = torch.randn(5, 8)
    index, weights = router(z, 2)
    for settings, resident in (
        (ChoiceSettings("cache-prior", 0.0), torch.rand(8) < 0.5),
        (ChoiceSettings("cache-prior", 9.0), torch.ones(8, dtype=torch.bool)),
    ):
        got, given = CacheAwareChoice(settings, 8)(z, index, weights, resident)
        assert got is index
        assert given is weights


def test_who_stays_keeps_its_place_and_an_untouched_token_its_weights():
    """Token 0 swaps its second expert for a resident one; token 1 has nothing to swap."""
    z = torch.tensor([[4.0, 3.0, 2.9, 0.0], [0.0, 0.0, 5.0, 4.0]])
    index, weights = router(z, 2)
    resident = torch.tensor([False, False, True, False])
    choice = CacheAwareChoice(ChoiceSettings("cache-prior", 0.1), 4)
    got, given = choice(z, index, weights, resident)
    assert got.tolist() == [[0, 2], [2, 3]]
    assert torch.equal(given[1], weights[1])
    assert given[0, 0] == weights[0, 0]
    assert choice.changed == 1


def test_a_token_that_skips_an_expert_is_left_alone():
    """An id equal to the number of experts means none was chosen."""
    z = torch.randn(2, 5)
    index, weights = router(z[:, :4], 2)
    weights = z.softmax(-1).gather(-1, index)
    index[0, 1] = 4
    choice = CacheAwareChoice(ChoiceSettings("cache-prior", 50.0, keep=0), 4)
    resident = torch.zeros(4, dtype=torch.bool)
    resident[int(torch.tensor([e for e in range(4) if e not in index[1].tolist()])[0])] = True
    earlier = torch.arange(10.0).reshape(2, 5).sin()
    chosen = earlier[:, :4].topk(2, dim=-1).indices
    choice.observe(earlier, chosen, earlier.softmax(-1).gather(-1, chosen))
    got, _ = choice(z, index, weights, resident)
    assert got[0].tolist() == index[0].tolist()
    assert got[1].tolist() != index[1].tolist()


RULES = {
    "softmax": ("softmax", False, 1.0),
    "renormalised": ("softmax", True, 1.0),
    "sigmoid, scaled": ("sigmoid", True, 2.5),
    "plain sigmoid": ("sigmoid", False, 1.0),
    "root of softplus": ("sqrt-softplus", True, 1.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_the_rule_is_read_off_the_weights(name, dtype):
    """Also where a correction bias decided the choice: the weights come from the plain logits."""
    function, normalised, scale = RULES[name]
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(16, 8, generator=generator)
    index = (z + torch.randn(8, generator=generator)).topk(3, dim=-1).indices
    given = Weighting(function, normalised, scale).weights(z, index).to(dtype)
    found = find_weighting(z, index, given)
    assert (found.function, found.normalised) == (function, normalised)
    assert found.scale == scale  # whatever tokens are seen


def test_an_unknown_rule_is_refused_and_a_changed_one_noticed():
    """Weights that follow nothing; then a rule that fitted once, and no longer does."""
    z = torch.randn(8, 6)
    index, weights = router(z, 2)
    with pytest.raises(UnsupportedModelError, match="not known"):
        find_weighting(z, index, torch.rand(8, 2) + 0.1)
    choice = CacheAwareChoice(ChoiceSettings("cache-prior", 0.5), 6)
    choice(z, index, weights, torch.ones(6, dtype=torch.bool))
    with pytest.raises(UnsupportedModelError):
        choice(z, index, torch.rand(8, 2) + 0.1, torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize(
    "wrong",
    [
        ("nearest", 0.1, 1),
        ("cache-prior", float("inf"), 1),
        ("cache-prior", float("nan"), 1),
        ("cache-prior", -1.0, 1),
        ("cache-prior", 0.5, -1),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    """One sentence with the way out."""
    with pytest.raises(AttachError):
        ChoiceSettings(*wrong)


@pytest.mark.parametrize("name", RULES)
def test_single_tokens_get_the_weights_of_the_rule_too(name):
    """One token fits several rules exactly; what an earlier pass showed decides between them."""
    function, normalised, scale = RULES[name]
    rule = Weighting(function, normalised, scale)
    generator = torch.Generator().manual_seed(5)
    choice = CacheAwareChoice(ChoiceSettings("cache-prior", 0.5, keep=1), 12)
    changed = 0
    for _ in range(40):
        z = torch.randn(1, 12, generator=generator) * 2
        index = z.topk(4, dim=-1).indices
        resident = torch.rand(12, generator=generator) < 0.4
        got, given = choice(z, index, rule.weights(z, index), resident)
        changed += int((got != index).sum())
        assert given[0].tolist() == pytest.approx(rule.weights(z, got)[0].tolist(), rel=1e-4)
    assert changed > 20


def test_one_choice_of_one_token_is_told_from_later_tokens():
    """Top-1 by a sigmoid: with one token every rule fits, so nothing is changed on one alone."""
    rule = Weighting("sigmoid", False, 1.0)
    choice = CacheAwareChoice(ChoiceSettings("cache-prior", 5.0, keep=0), 3)
    resident = torch.tensor([False, False, True])
    for number, z in enumerate(([[2.0, 1.0, 0.5]], [[0.3, 1.5, 0.1]], [[1.0, 0.2, -1.0]])):
        logits = torch.tensor(z)
        index = logits.topk(1, dim=-1).indices
        got, given = choice(logits, index, rule.weights(logits, index), resident)
        assert got.tolist() == (index.tolist() if number == 0 else [[2]])
        assert torch.allclose(given, rule.weights(logits, got))


def test_a_correction_bias_stays_where_the_cache_has_nothing_to_add():
    """The router prefers expert 0 by its bias; all or none resident, nothing is gained."""
    bias = torch.tensor([6.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    z = torch.tensor([[-2.0, 1.0, 0.5, 2.0, -1.0, 0.0]])
    index = (z + bias).topk(2, dim=-1).indices
    assert index.tolist() == [[0, 3]]
    rule = Weighting("sigmoid", True, 1.0)
    earlier = torch.arange(24.0).reshape(4, 6).sin()
    for resident in (torch.ones(6), torch.zeros(6), torch.tensor([1.0, 1, 0, 1, 0, 0])):
        choice = CacheAwareChoice(ChoiceSettings("cache-prior", 0.4, keep=0), 6)
        chosen = earlier.topk(2, dim=-1).indices
        choice.observe(earlier, chosen, rule.weights(earlier, chosen))
        got, _ = choice(z, index, rule.weights(z, index), resident.bool())
        assert got.tolist() == index.tolist()


def test_the_spread_is_a_mean_over_tokens_however_they_are_batched():
    """Five tokens of spread 2 after one of spread 1 weigh as much in one pass as in five."""
    first, later = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    spreads = []
    for passes in ([later] * 5, [later.repeat(5, 1)]):
        choice = CacheAwareChoice(ChoiceSettings("cache-prior", 0.1), 2)
        choice.observe(later, *router(later, 1))
        for z in [first, *passes]:
            index, weights = router(z, 1)
            choice(z, index, weights, torch.ones(2, dtype=torch.bool))
        spreads.append(choice._spread)
    assert spreads[0] == pytest.approx(spreads[1])
    assert spreads[0] == pytest.approx(2 - 0.99**5)
