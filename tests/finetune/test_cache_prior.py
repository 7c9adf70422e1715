"""Fine-tuning under the cache prior, from the settings to the trained model."""

import math
from dataclasses import replace

import pytest
import torch
from small_runs import examples, settings, trained
from tiny import tiny_model

import melinoe.finetune.training as training_module
from melinoe.errors import TrainingError, UnsupportedModelError
from melinoe.finetune import train
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers

# Biases, groups, sigmoids, a gate of its own, none at all, two stacks in a layer.
ODD = ["deepseek_v3", "dots1", "ernie4_5_vl_moe", "gpt_oss", "nemotron_h", "minimax_m2"]


@pytest.fixture
def kept(monkeypatch):
    """Every prior that a run makes."""
    made, whole = [], training_module.PriorRouting

    def remember(*arguments, **options):
        made.append(whole(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(training_module, "PriorRouting", remember)
    return made


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_completions_are_trained_on_other_choices_and_the_model_is_plain_again(kept):
    """Every use of a completion token passes the prior, some are replaced; no hook stays."""
    model = tiny_model("olmoe")
    before = hooks_on(model)
    rows = trained(model, cache_prior=1.0, steps=3)
    assert all(math.isfinite(row["total"]) for row in rows)
    (prior,) = kept
    tokens = sum(sum(one.completion_mask) for one in examples())  # one step sees all of them
    uses = tokens * sum(int(router.top_k) for router in find_routers(model))
    assert prior.uses == 3 * uses
    assert 0 < prior.replaced < prior.uses
    assert hooks_on(model) == before


def test_measurements_are_of_the_routers_own_choices():
    """Before the first step the held-out terms are those of a run without the prior."""
    first = []
    for strength in (0.0, 5.0):
        torch.manual_seed(0)
        model = tiny_model("olmoe")
        rows, _ = training_module.train(
            model,
            examples(),
            settings(cache_prior=strength, steps=1),
            pad_token_id=0,
            eval_data=examples(),
        )
        first.append(rows[0])
        last = rows[-1]
    assert first[0] == first[1]
    assert last["eval_nll"] != first[0]["eval_nll"]


def test_a_prior_of_zero_makes_no_difference_and_the_control_has_none(kept):
    """Its hooks are not even there."""
    plain = trained(tiny_model("olmoe"), steps=2)
    assert trained(tiny_model("olmoe"), steps=2, cache_prior=0.0) == plain and not kept
    with_prior = settings(cache_prior=0.3, lambda_cache=0.0, anchor="none")
    assert not with_prior.is_control
    assert with_prior.control().is_control and with_prior.control().cache_prior == 0.0
    assert replace(with_prior, cache_prior=0.0).is_control


def test_a_strength_below_zero_is_refused():
    """One sentence that names it."""
    with pytest.raises(TrainingError, match="cache_prior cannot be -1"):
        settings(cache_prior=-1.0)


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("family", ODD)
def test_families_with_odd_routers_train_under_the_prior(kept, family):
    """Finite terms, replaced choices, moved routers and experts."""
    model = tiny_model(family)
    routers, layers = find_routers(model), find_experts(model)
    with torch.no_grad():
        for one in routers:
            one.weight.normal_(std=0.5)
    before = [one.weight.detach().clone() for one in routers]
    stacks = [one.module.get_parameter("down_proj").detach().clone() for one in layers]
    rows = trained(model, cache_prior=2.0)
    assert all(math.isfinite(row["total"]) for row in rows)
    assert kept[0].replaced > 0
    for one, old in zip(routers, before, strict=True):
        assert torch.equal(one.weight, old) == (".vision_" in one.name)
    for layer, old in zip(layers, stacks, strict=True):
        kept_weights = torch.equal(layer.module.get_parameter("down_proj"), old)
        assert kept_weights == (".vision_" in layer.name)


def phimoe():
    """Its routers mix by a rule of their own."""
    model = tiny_model("phimoe")
    model.config.router_jitter_noise = 0.0
    with torch.no_grad():
        for one in find_routers(model):
            one.weight.normal_(std=0.5)
    return model


@pytest.mark.filterwarnings("default")
def test_a_family_whose_weights_follow_no_known_rule_is_told_to_train_without():
    """Newcomers need the weight that the router would have given them."""
    with pytest.raises(UnsupportedModelError, match="cache_prior 0"):
        trained(phimoe(), cache_prior=0.5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_the_prior_goes_on(kept, broken):
    """A router sees hidden states that broke, once: no other cause is named, none is given up."""
    model, calls = tiny_model("olmoe"), []
    router = find_routers(model)[1]

    def breaking(module, args):
        calls.extend([1] * torch.is_grad_enabled())  # a training step's pass, no measurement
        if len(calls) == 2 and torch.is_grad_enabled():
            return (args[0] * broken,)
        return None

    handle = router.module.register_forward_pre_hook(breaking)
    rows, skipped = train(model, examples(), settings(cache_prior=1.0, steps=4), pad_token_id=0)
    handle.remove()
    assert skipped == 1 and all(math.isfinite(row["total"]) for row in rows)
    assert kept[0].strength == 1.0 and kept[0].replaced > 0
