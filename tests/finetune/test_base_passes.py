"""Passes of the base model beside a batch: anchors, distillation, anchor text."""

import pytest
import torch
from slow_losses import slow_distillation
from small_runs import examples as texts
from small_runs import settings
from tiny import VOCAB, tiny_model

from melinoe.config import FinetuneSettings
from melinoe.errors import TrainingError
from melinoe.finetune import train
from melinoe.finetune.forward import forward_terms
from melinoe.finetune.parts.adapters import make_trainable
from melinoe.finetune.terms.base_pass import base_pass
from melinoe.finetune.terms.objective import Objective
from melinoe.finetune.terms.replay import Replay
from melinoe.moe.base_routers import BaseRouters
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import RoutingRecorder, find_routers


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "mixtral", "phimoe"])
def test_the_base_pass_is_the_model_before_training(family):
    """Routers and expert updates moved: its logits equal a copy's, kept from before, bit for bit.

    Its router logits are the copy's too, and afterwards the model computes what it did before.
    """
    model, copy = tiny_model(family), tiny_model(family)
    copy.load_state_dict(model.state_dict())
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    routers, base = find_routers(model), BaseRouters(find_routers(model))
    parts = make_trainable(model, routers, find_experts(model), settings())
    with torch.no_grad():
        untrained = model(ids).logits
        for parameter in parts.all():
            parameter += 0.1 * torch.randn_like(parameter)
        moved = model(ids).logits
        with RoutingRecorder(find_routers(copy)) as recorder:
            copy(ids)
            expected = recorder.take()
    got = base_pass(model, {"input_ids": ids, "labels": ids}, base, parts.updates)
    assert torch.equal(got.logits, untrained)
    assert not torch.allclose(got.logits, moved)
    for one in expected:
        torch.testing.assert_close(got.router_logits[one.router.index], one.logits)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, moved)


def test_an_interrupted_base_pass_puts_the_model_back():
    """The model fails in the middle: routers and updates answer for themselves again."""
    model = tiny_model("olmoe")
    routers, base = find_routers(model), BaseRouters(find_routers(model))
    parts = make_trainable(model, routers, find_experts(model), settings())
    with pytest.raises(ValueError, match="input_ids"):
        base_pass(model, {"no_such_input": None}, base, parts.updates)
    assert all("forward" not in router.module.__dict__ for router in routers)
    assert all(parts.updates.of(layer).enabled for layer in parts.updates.layers)


@pytest.mark.parametrize("anchor", ["rank", "kl"])
def test_both_references_agree_before_the_first_step(anchor):
    """The model is the base, so the base router on its states says what the base model says."""
    rows = {
        reference: train(
            tiny_model("olmoe"),
            texts(),
            settings(reference=reference, anchor=anchor, lambda_rank=1.0, rho=0.01),
            pad_token_id=0,
        )[0]
        for reference in ("router", "pass")
    }
    first = [rows[reference][0]["anchor"] for reference in ("router", "pass")]
    last = [rows[reference][-1]["anchor"] for reference in ("router", "pass")]
    assert first[0] == pytest.approx(first[1], abs=1e-6)
    assert last[0] != pytest.approx(last[1], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"lambda_rank": 1.0}, 2),
        ({"lambda_rank": 0.0}, 1),
        ({"lambda_rank": 1.0, "anchor": "none"}, 1),
        ({"lambda_rank": 0.0, "lambda_distill": 0.5}, 2),
    ],
)
def test_the_base_model_runs_only_where_a_term_that_weighs_something_asks(changes, passes):
    """Counted: one forward pass a step, and one more for the anchor, or for distillation."""
    model, calls = tiny_model("olmoe"), []
    chosen = settings(reference="pass", **changes)
    objective = Objective(find_routers(model), chosen)
    parts = make_trainable(model, find_routers(model), find_experts(model), chosen)
    objective.updates = parts
    model.register_forward_hook(lambda *_: calls.append(1))
    terms, _ = forward_terms(model, batch_of(texts()), objective, training=True)
    assert len(calls) == passes
    assert (terms.anchor > 0) == (changes["lambda_rank"] > 0 and "anchor" not in changes)
    terms.total.backward()


def batch_of(data):
    """What the collator gives for *data*."""
    return Replay(data, len(data), 0, 0)._collate(data)


def test_terms_of_other_passes_equal_their_formulas():
    """Distillation on the batch, and KL on anchor text, both against loops over a kept copy."""
    model, copy = tiny_model("olmoe"), tiny_model("olmoe")
    copy.load_state_dict(model.state_dict())
    replay = Replay(texts(3, seed=5), 2, 0, seed=0)
    chosen = settings(
        lambda_distill=0.3, lambda_replay=0.7, replay_loss="kl", lambda_cache=0.0, anchor="none"
    )
    objective = Objective(find_routers(model), chosen, replay=replay)
    parts = make_trainable(model, find_routers(model), find_experts(model), chosen)
    objective.updates = parts
    with torch.no_grad():
        for parameter in parts.all():
            parameter += 0.05 * torch.randn_like(parameter)
    batch = batch_of(texts())
    objective.begin_step(0, 10, 4)
    terms, _ = forward_terms(model, batch, objective, training=True)

    def divergence(batch):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ours, base = (one(**inputs).logits.double() for one in (model, copy))
        return float(slow_distillation(ours, base, batch["labels"]))

    assert terms.more["distill"].item() == pytest.approx(divergence(batch), rel=1e-3)
    assert terms.more["replay"].item() == pytest.approx(divergence(replay.batch(4)), rel=1e-3)
    weighed = terms.nll + 0.3 * terms.more["distill"] + 0.7 * terms.more["replay"]
    assert terms.total.item() == pytest.approx(weighed.item())
    measured, _ = forward_terms(model, batch, objective, training=False)
    assert "replay" not in measured.more and measured.more["distill"] > 0


def test_measuring_imagines_the_final_cache():
    """Before the first step of a curriculum: training sees all experts resident, measuring not."""
    model = tiny_model("olmoe")
    chosen = settings(capacity_curriculum=1.0, gamma=1.0)
    batch, caches = batch_of(texts()), []
    for objective in (Objective(find_routers(model), one) for one in (chosen, settings(gamma=1.0))):
        terms, _ = forward_terms(model, batch, objective, training=False)
        caches.append(terms.cache.item())
    training, _ = forward_terms(model, batch, Objective(find_routers(model), chosen), training=True)
    assert training.cache.item() < caches[0] == caches[1]


def test_distillation_keeps_the_words_nearer_to_the_base_model():
    """A heavy weight: less divergence on the training text than without it."""
    distances, given = {}, {"steps": 12, "lambda_cache": 0.5}
    for weight in (0.0, 20.0):
        model, copy = tiny_model("olmoe"), tiny_model("olmoe")
        copy.load_state_dict(model.state_dict())
        train(model, texts(), settings(**given, lambda_distill=weight), pad_token_id=0)
        batch = batch_of(texts())
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            ours, base = (one(**inputs).logits.double() for one in (model, copy))
        distances[weight] = float(slow_distillation(ours, base, batch["labels"]))
    assert distances[20.0] < 0.7 * distances[0.0]


def test_replay_shows_every_text_once_before_any_again():
    """Five texts, two at a time: the first five shown are all of them, whatever the order."""
    data = texts(5)
    replay = Replay(data, 2, 0, seed=3)
    shown = [tuple(row[row > 0].tolist()) for n in range(5) for row in replay.batch(n)["input_ids"]]
    wanted = {tuple(one.input_ids) for one in data}
    assert set(shown[:5]) == set(shown[5:]) == wanted and shown[:5] != shown[5:]
    again = Replay(data, 2, 0, seed=3).batch(4)
    assert torch.equal(again["input_ids"], replay.batch(4)["input_ids"])
    labels = replay.batch(0)["labels"]
    assert (labels[:, 0] == -100).all() and (labels[:, 1:4] != -100).all()


def test_a_replay_term_without_text_is_refused():
    """The weight is set and nothing is there to weigh."""
    with pytest.raises(TrainingError, match="no anchor text"):
        Objective(find_routers(tiny_model("olmoe")), FinetuneSettings(lambda_replay=0.1))
