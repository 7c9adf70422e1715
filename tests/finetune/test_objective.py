"""The objective against its formulas in loops."""

from dataclasses import asdict, replace

import pytest
import torch
from slow_losses import slow_cache_loss, slow_concentration_loss, slow_rank_loss
from small_runs import examples, settings
from tiny import tiny_model
from torch import nn

from melinoe.config import FinetuneSettings
from melinoe.data import Collator
from melinoe.errors import TrainingError
from melinoe.finetune.objective import Objective, Replay
from melinoe.finetune.parts import make_trainable
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import Router, Routing, find_routers

HIDDEN = 6
SHAPES = ((7, 2), (7, 2), (12, 3))  # experts and top-k of three layers: two alike, one of its own


def labels_of():
    """A row with padding behind it and a full one; prompts are not counted."""
    labels = torch.full((2, 17), -100)
    labels[0, 2:13], labels[1, 5:] = 1, 3
    return labels


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
        mask, total = labels_of() != -100, nll
        for number, leaf in enumerate(leaves):
            logits = leaf.view(2, 17, -1)
            index = self.index[number].view(2, 17, -1)
            cache = slow_cache_loss(
                logits,
                index,
                mask,
                capacities[number],
                settings.gamma,
                form=settings.cache_loss,
                denominator=denominator,
            )
            term = settings.lambda_cache * cache
            if settings.lambda_rank:
                base = (self.inputs[number].double() @ self.before[number].T).view(logits.shape)
                rank = slow_rank_loss(logits, base, mask, settings.rho, denominator)
                term = term + settings.lambda_rank * rank
            if settings.lambda_concentration:
                own = slow_concentration_loss(logits, index, mask, capacities[number])
                share = 1 if denominator is None else int(mask.sum()) / denominator
                term = term + settings.lambda_concentration * own * share
            total = total + term / len(leaves)
        return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_loss": "literal", "lambda_rank": 0.5},
        {"cache_loss": "resident", "gamma": 0.3, "lambda_rank": 0.1, "rho": 0.3},
        {"lambda_cache": 0.0, "lambda_concentration": 0.7},
        {"lambda_cache": 0.0},
    ],
)
@pytest.mark.parametrize("denominator", [None, 31.0])
def test_total_and_gradient_equal_the_formula_in_loops(changes, denominator):
    """Layers of two shapes, padding, prompts, skip slots; E = 7 and 12."""
    layers = Layers(1)
    settings = FinetuneSettings(
        **{"capacity": 0.3, "lambda_replay": 0.0, "cache_loss": "clipped"} | changes
    )
    objective = Objective(layers.routers, settings)
    layers.move()
    nll = torch.tensor(2.5)
    terms = objective.weigh(nll, layers.routings(), labels_of(), denominator)
    capacities = (2, 2, 4)  # 0.3 of 7 and 12 experts
    leaves = [one.detach().double().requires_grad_() for one in layers.logits]
    expected = layers.slow_total(leaves, nll.double(), settings, capacities, denominator)
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-5)
    if settings.is_control:
        assert not terms.total.requires_grad and terms["cache"] > 0
        return
    terms.total.backward()
    expected.backward()
    for fast, slow in zip(layers.logits, leaves, strict=True):
        wanted = torch.zeros_like(slow) if slow.grad is None else slow.grad
        torch.testing.assert_close(fast.grad.double(), wanted, atol=1e-6, rtol=1e-3)


def test_the_cache_term_adds_in_proportion_to_its_weight():
    """Twice the weight, twice what it adds; what is watched at weight 0 stays the same."""
    layers = Layers(2)
    totals = []
    for weight in (0.0, 1.0, 2.0):
        settings = FinetuneSettings(capacity=0.3, lambda_replay=0.0, lambda_cache=weight)
        objective = Objective(layers.routers, settings)
        terms = objective.weigh(torch.zeros(()), layers.routings(), labels_of())
        totals.append(float(terms.total.detach()))
    assert totals[0] == 0.0 and totals[2] == pytest.approx(2 * totals[1])


def test_a_cache_smaller_than_one_token_needs_is_refused():
    """.1 of 12 experts is 1, fewer than three; the message says what would do."""
    layers = Layers(1)
    with pytest.raises(TrainingError, match=r"of 12 experts, fewer than the 3 .* to 0\.25"):
        Objective(layers.routers[2:], FinetuneSettings(capacity=0.1, lambda_replay=0.0))


def test_a_control_lacks_the_locality_terms_alone():
    """Replay and seed stay; the plain run has next tokens alone."""
    chosen = FinetuneSettings(lambda_replay=0.5, lambda_concentration=0.2, seed=7)
    control, plain = chosen.control(), chosen.plain()
    assert control.is_control and not chosen.is_control and control.plain() != control
    assert asdict(control) == asdict(chosen) | {"lambda_cache": 0.0, "lambda_concentration": 0.0}
    assert plain.plain() == plain
    assert asdict(plain) == asdict(control) | {"lambda_replay": 0.0}


def test_settings_of_terms_that_weigh_nothing_decide_nothing():
    """So two controls agree whatever cache their runs imagined; a term that weighs has its own."""
    one = FinetuneSettings(
        capacity=0.5, gamma=0.5, own_texts=7, save="both", log_every=3, lambda_replay=0.0
    )
    other = FinetuneSettings(lambda_replay=0.0)
    assert one.deciding() != other.deciding()
    assert one.control().deciding() == other.control().deciding()
    replayed = FinetuneSettings(lambda_replay=0.1, own_texts=7)
    assert replayed.control().deciding()["own_texts"] == 7


# ---- passes beside the batch's own ----


def batch_of(data):
    """What the collator gives for *data*."""
    return Collator(0)(data)


def objective_of(model, chosen, **options):
    """The objective of *model* with its parts trainable, as a run makes it."""
    routers, layers = find_routers(model), find_experts(model)
    make_trainable(model, routers, layers, chosen, rank=2)
    return Objective(routers, chosen, **options)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({}, 1), ({"lambda_replay": 0.5}, 2)],
)
def test_the_model_runs_again_only_where_a_term_that_weighs_something_asks(changes, passes):
    """Counted: one forward pass a step, one more for replay."""
    model, calls = tiny_model("olmoe"), []
    chosen = settings(**changes)
    objective = objective_of(model, chosen, replay=Replay(examples(), 0, 0))
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    terms = objective.measure(model, batch_of(examples()), training=True)
    assert len(calls) == passes
    wanted = {"nll", "cache"} | {name.removeprefix("lambda_") for name in changes}
    assert terms.values.keys() == wanted
    terms.total.backward()


def test_replay_is_the_next_token_loss_of_its_own_batch():
    """Batch 4 of the anchor text, by transformers' own loss on a kept copy; not when measuring."""
    model, copy = tiny_model("olmoe"), tiny_model("olmoe")
    copy.load_state_dict(model.state_dict())
    replay, chosen = Replay(examples(3, seed=5), 0, seed=0), settings(lambda_replay=0.7)
    objective, batch = objective_of(model, chosen, replay=replay), batch_of(examples())
    objective.next_replayed = 4
    terms = objective.measure(model, batch, training=True)
    anchor = replay.batch(4)
    inputs = {key: anchor[key] for key in ("input_ids", "attention_mask", "labels")}
    assert terms["replay"].item() == pytest.approx(copy(**inputs).loss.item(), rel=1e-5)
    weighed = terms["nll"] + terms["cache"] + 0.7 * terms["replay"]
    assert terms.total.item() == pytest.approx(weighed.item())
    assert "replay" not in objective.measure(model, batch, training=False).values


def test_replay_shows_every_text_once_before_any_again():
    """Five texts, two at a time: the first five shown are all of them, whatever the order."""
    data = examples(5)
    replay = Replay(data, 0, seed=3)
    shown = [tuple(row[row > 0].tolist()) for n in range(5) for row in replay.batch(n)["input_ids"]]
    wanted = {tuple(one.input_ids) for one in data}
    assert set(shown[:5]) == set(shown[5:]) == wanted and shown[:5] != shown[5:]
    again = Replay(data, 0, seed=3).batch(4)
    assert torch.equal(again["input_ids"], replay.batch(4)["input_ids"])
    labels = replay.batch(0)["labels"]
    assert (labels[:, 0] == -100).all() and (labels[:, 1:4] != -100).all()


def test_a_replay_term_without_text_is_refused():
    """The weight is set and nothing is there to weigh."""
    with pytest.raises(TrainingError, match="no anchor text"):
        Objective(find_routers(tiny_model("olmoe")), FinetuneSettings(lambda_replay=0.1))
