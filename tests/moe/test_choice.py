"""Cache-aware choice: against a slow loop, and what must stay as it was."""

import math

import pytest
import torch

from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.moe.choice import CacheAwareChoice, ChoiceSettings
from melinoe.moe.weighting import Weighting, find_weighting


def router(logits, top_k):
    """OLMoE's rule: softmax over all, the top-k's probabilities as they are."""
    weights, index = logits.softmax(-1).topk(top_k, dim=-1)
    return index, weights


def expected_set(kind, z, chosen, resident, strength, keep, spread):
    """The experts that one token should use, by loops over plain numbers."""
    experts = range(len(z))
    by_logit = sorted(chosen, key=lambda e: -z[e])
    kept = by_logit[:keep]
    if kind == "cache-prior":
        value = {e: z[e] + (strength * spread if resident[e] else 0.0) for e in experts}
        others = sorted((e for e in experts if e not in kept), key=lambda e: -value[e])
        return set(kept) | set(others[: len(chosen) - len(kept)])
    total = sum(math.exp(v) for v in z)
    p = [math.exp(v) / total for v in z]
    bar = (1 - strength) * max(p[e] for e in chosen)
    result = [e for e in chosen if e in kept or resident[e]]
    candidates = sorted(
        (e for e in experts if resident[e] and e not in chosen and p[e] >= bar), key=lambda e: -p[e]
    )
    missing = sorted((e for e in chosen if e not in result), key=lambda e: -p[e])
    for e in candidates + missing:
        if len(result) < len(chosen):
            result.append(e)
    return set(result)


@pytest.mark.parametrize("kind", ["cache-prior", "reroute"])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_choices_equal_a_slow_loop(kind, strength, keep):
    """Random logits and caches, one token at a time, over and over."""
    generator = torch.Generator().manual_seed(3)
    choice = CacheAwareChoice(ChoiceSettings(kind, strength, keep), 12)
    spread = None
    for _ in range(60):
        z = torch.randn(1, 12, generator=generator) * 2
        resident = torch.rand(12, generator=generator) < 0.4
        index, weights = router(z, 4)
        now = float(z.max() - z.min())
        spread = now if spread is None else 0.99 * spread + 0.01 * now
        got, given = choice(z, index, weights, resident)
        wanted = expected_set(
            kind, z[0].tolist(), index[0].tolist(), resident.tolist(), strength, keep, spread
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
        (ChoiceSettings("reroute", 0.0, keep=0), torch.zeros(8, dtype=torch.bool)),
        (ChoiceSettings("cache-prior", 9.0), torch.ones(8, dtype=torch.bool)),
        (ChoiceSettings("reroute", 1.0), torch.ones(8, dtype=torch.bool)),
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
    assert found.scale == pytest.approx(scale, rel=1e-2)


def test_an_unknown_rule_is_refused_and_a_changed_one_noticed():
    """Weights that follow nothing; then a rule that fitted once, and no longer does."""
    z = torch.randn(8, 6)
    index, weights = router(z, 2)
    with pytest.raises(UnsupportedModelError, match="not known"):
        find_weighting(z, index, torch.rand(8, 2) + 0.1)
    choice = CacheAwareChoice(ChoiceSettings("reroute", 0.5), 6)
    choice(z, index, weights, torch.ones(6, dtype=torch.bool))
    with pytest.raises(UnsupportedModelError):
        choice(z, index, torch.rand(8, 2) + 0.1, torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize(
    "wrong",
    [("nearest", 0.1, 1), ("reroute", 1.5, 1), ("cache-prior", -1.0, 1), ("reroute", 0.5, -1)],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    """One sentence with the way out."""
    with pytest.raises(AttachError):
        ChoiceSettings(*wrong)
