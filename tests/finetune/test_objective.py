"""The objective against its formulas in loops."""

from dataclasses import asdict, replace

import pytest
import torch
from slow_losses import (
    slow_cache_loss,
    slow_kl,
    slow_rank_loss,
    slow_reuse_loss,
)
from torch import nn

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune.terms.objective import Objective
from melinoe.moe.routing import Router, Routing

HIDDEN = 6
SHAPES = ((7, 2), (7, 2), (12, 3))  # experts and top-k of three layers: two alike, one of its own


def segments_and_labels():
    """A row of two packed sequences and padding, and a row of one; prompts are not counted."""
    segments = torch.zeros(2, 17, dtype=torch.int64)
    segments[0, 6:13], segments[0, 13:] = 1, -1
    labels = torch.full((2, 17), -100)
    labels[0, 2:6], labels[0, 6:13], labels[1, 5:] = 1, 2, 3
    return segments, labels


class Layers:
    """Routers of three layers that are linear maps, and what they recorded on random inputs."""

    def __init__(self, seed):
        g = torch.Generator().manual_seed(seed)
        self.routers, self.inputs, self.before = [], [], []
        self.index, self.logits = [], []
        for number, (experts, top_k) in enumerate(SHAPES):
            module = nn.Linear(HIDDEN, experts, bias=False)
            module.weight.data = torch.randn(experts, HIDDEN, generator=g)
            router = Router(number, f"gate{number}", module, "", nn.Identity(), experts, experts, 1)
            self.routers.append(replace(router, top_k=top_k))
            self.before.append(module.weight.detach().double().clone())
            self.inputs.append(torch.randn(34, HIDDEN, generator=g))
            chosen = torch.rand(34, experts, generator=g).topk(top_k).indices
            chosen[::9, 0] = experts  # a skip slot
            self.index.append(chosen)

    def move(self):
        """Train a little: the weights are no longer the base's."""
        for router in self.routers:
            router.weight.data += 0.3 * torch.randn_like(router.weight)

    def routings(self):
        """As a recorder gives them; the logits are leaves, to see their gradients."""
        self.logits = [
            (x @ one.weight.detach().T).requires_grad_()
            for x, one in zip(self.inputs, self.routers, strict=True)
        ]
        return [
            Routing(router, logits, index, ((x,), {}))
            for router, logits, index, x in zip(
                self.routers, self.logits, self.index, self.inputs, strict=True
            )
        ]

    def slow_total(self, leaves, nll, settings, capacities, denominator):
        """The formula of the method page, layer by layer."""
        segments, labels = segments_and_labels()
        mask, total = labels != -100, nll
        for number, leaf in enumerate(leaves):
            logits = leaf.view(2, 17, -1)
            index = self.index[number].view(2, 17, -1)
            base = (self.inputs[number].double() @ self.before[number].T).view(logits.shape)
            weight = (settings.layer_weight or (1, 1, 1))[number]
            cache = slow_cache_loss(
                logits,
                index,
                mask,
                segments,
                capacities[number],
                settings.gamma,
                form=settings.cache_loss,
                through_cache=settings.cache_gradient,
                swap_margin=settings.swap_margin,
                denominator=denominator,
            )
            term = settings.lambda_cache * weight * cache
            if settings.lambda_reuse:
                reuse = slow_reuse_loss(logits, index, mask, segments, denominator)
                term = term + settings.lambda_reuse * weight * reuse
            if settings.anchor == "rank":
                anchor = slow_rank_loss(
                    logits, base, mask, settings.rho, settings.rank_reduce, denominator
                )
                term = term + settings.lambda_rank * anchor
            if settings.anchor == "kl":
                term = term + settings.lambda_rank * slow_kl(logits, base, mask, denominator)
            total = total + term / len(leaves)
        return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_loss": "literal", "anchor": "kl", "lambda_rank": 0.7},
        {"cache_gradient": True, "rank_reduce": "sum", "rho": 0.3},
        {"cache_loss": "resident", "gamma": 0.3, "anchor": "none"},
        {"swap_margin": 1.0, "lambda_reuse": 0.4, "layer_weight": (0.5, 2.0, 0.0)},
        {"layer_capacity": (0.3, 0.6, 0.9), "gamma": 1.0},
        {"lambda_cache": 0.0, "lambda_rank": 0.0},
    ],
)
@pytest.mark.parametrize("denominator", [None, 31.0])
def test_total_and_gradient_equal_the_formula_in_loops(changes, denominator):
    """Layers of two shapes, packed rows, padding, prompts, skip slots; E = 7 and 12."""
    layers = Layers(1)
    settings = FinetuneSettings(
        **{"capacity": 0.3, "lambda_rank": 0.1, "lambda_replay": 0.0, "cache_loss": "clipped"}
        | changes
    )
    objective = Objective(layers.routers, settings)
    layers.move()
    segments, labels = segments_and_labels()
    nll = torch.tensor(2.5)
    terms = objective(nll, layers.routings(), labels, segments, denominator)
    # 0.3 of 7 and 12 experts: 2 and 4; .6 of 7 is 4; .9 of 12 is 11
    capacities = (2, 4, 11) if "layer_capacity" in changes else (2, 2, 4)
    leaves = [one.detach().double().requires_grad_() for one in layers.logits]
    expected = layers.slow_total(leaves, nll.double(), settings, capacities, denominator)
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-5)
    if settings.is_control:
        assert not terms.total.requires_grad and terms.cache > 0
        return
    terms.total.backward()
    expected.backward()
    for fast, slow in zip(layers.logits, leaves, strict=True):
        wanted = torch.zeros_like(slow) if slow.grad is None else slow.grad
        torch.testing.assert_close(fast.grad.double(), wanted, atol=1e-6, rtol=1e-3)


def test_the_weight_of_the_cache_term_may_change_between_steps():
    """Twice the weight, twice what it adds; what is watched at weight 0 stays the same."""
    layers = Layers(2)
    settings = FinetuneSettings(capacity=0.3, anchor="none", lambda_replay=0.0)
    objective = Objective(layers.routers, settings)
    segments, labels = segments_and_labels()
    totals = []
    for weight in (0.0, 1.0, 2.0):
        objective.lambda_cache = weight
        terms = objective(torch.zeros(()), layers.routings(), labels, segments)
        assert terms.weights["cache"] == weight
        totals.append(float(terms.total.detach()))
    assert totals[0] == 0.0 and totals[2] == pytest.approx(2 * totals[1])


def test_the_cache_shrinks_from_all_experts_to_its_size():
    """E = 12, C = 4, over half the run: 12, 8 at a quarter, 4 from a half on."""
    layers = Layers(3)
    objective = Objective(
        layers.routers, FinetuneSettings(capacity=0.3, capacity_curriculum=0.5, lambda_replay=0.0)
    )
    sizes = []
    for objective.caches.progress in (0.0, 0.25, 0.5, 1.0):
        sizes.append(objective.caches.capacity_of(layers.routers[2]))
    assert sizes == [12.0, 8.0, 4, 4]
    objective.begin_step(25, 100, 0)
    assert objective.caches.progress == 0.25
    segments, labels = segments_and_labels()
    caches = {}
    for progress in (0.25, 1.0):
        objective.caches.progress = progress
        terms = objective(torch.zeros(()), layers.routings(), labels, segments)
        caches[progress] = float(terms.cache.detach())
    assert caches[0.25] < caches[1.0]


@pytest.mark.parametrize("name", ["layer_capacity", "layer_weight"])
def test_values_for_layers_that_are_not_there_are_refused(name):
    """Two values for three layers: the message has both numbers."""
    settings = FinetuneSettings(**{name: (0.5, 0.5)}, lambda_replay=0.0)
    with pytest.raises(TrainingError, match=r"2 values but the model has 3 MoE layers"):
        Objective(Layers(1).routers, settings)


def test_a_layer_whose_own_capacity_is_too_small_is_refused():
    """.1 of 12 experts is 1, fewer than three."""
    settings = FinetuneSettings(layer_capacity=(0.5, 0.5, 0.1), lambda_replay=0.0)
    with pytest.raises(TrainingError, match=r"capacity of 0\.1 is 1 of 12 .* the 3 that"):
        Objective(Layers(1).routers, settings)


def test_a_control_lacks_the_locality_terms_alone():
    """Teacher, replay, anchor and seed stay; the plain run has next tokens alone."""
    chosen = FinetuneSettings(
        lambda_reuse=1.0, lambda_match=1.0, lambda_replay=0.5, lambda_rank=0.1, cache_prior=0.2,
        layer_capacity=[0.5], seed=7,
    )  # fmt: skip
    control, plain = chosen.control(), chosen.plain()
    assert control.is_control and not chosen.is_control and not control.is_plain
    off = {"lambda_cache": 0.0, "lambda_reuse": 0.0, "cache_prior": 0.0}
    assert asdict(control) == asdict(chosen) | off
    also = {"lambda_match": 0.0, "lambda_replay": 0.0, "lambda_rank": 0.0}
    assert plain.is_plain and asdict(plain) == asdict(control) | also


def test_settings_of_terms_that_weigh_nothing_decide_nothing():
    """So two controls agree whatever cache their runs imagined; a term that weighs has its own."""
    one = FinetuneSettings(
        capacity=0.5, gamma=0.5, rho=0.3, own_texts=7, save="both", log_every=3, lambda_replay=0.0
    )
    other = FinetuneSettings(layer_capacity=(0.25,), lambda_replay=0.0)
    assert one.deciding() != other.deciding()
    assert one.control().deciding() == other.control().deciding()
    replayed = FinetuneSettings(lambda_replay=0.1, own_texts=7)
    assert replayed.control().deciding()["own_texts"] == 7
    assert "eval_every" in FinetuneSettings(keep="best", eval_every=2).deciding()


def test_is_control_by_each_weight():
    """An anchor of weight 0 or of no kind is none."""
    assert not FinetuneSettings(lambda_cache=0.0, lambda_rank=0.0, lambda_reuse=0.1).is_control
    assert FinetuneSettings(lambda_cache=0.0, anchor="none").is_control
    assert not FinetuneSettings(lambda_cache=0.0, anchor="none", cache_prior=0.2).is_control
