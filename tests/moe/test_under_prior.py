"""Training under the cache prior: the choices of decoding, over whole texts at once."""

import numpy as np
import pytest
import torch

from melinoe.cache import prior_kernel
from melinoe.cache.residency import Residency
from melinoe.errors import UnsupportedModelError
from melinoe.finetune.preparing import recompute
from melinoe.moe.choice import CacheAwareChoice, ChoiceSettings
from melinoe.moe.routing import RoutingRecorder, find_routers
from melinoe.moe.under_prior import PriorRouting, Texts
from tests.tiny import tiny_model

EXPERTS, TOP_K = 12, 3


def chosen_by(logits):
    """OLMoE's rule."""
    weights, index = logits.softmax(-1).topk(TOP_K, dim=-1)
    return index, weights


def decoded_one_by_one(logits, index, segments, completion, capacity, strength, keep):
    """What the runtime's own parts do with each text of a row: prompts whole, then by token."""
    result = index.clone()
    for segment in dict.fromkeys(s for s in segments.tolist() if s >= 0):
        residency = Residency(EXPERTS, capacity, "lfu")
        choice = CacheAwareChoice(ChoiceSettings("cache-prior", strength, keep), EXPERTS)
        warm = torch.randn(8, EXPERTS)
        choice.observe(warm, *chosen_by(warm))  # it knows the rule of the weights
        at = torch.nonzero(segments == segment).flatten().tolist()
        while at:
            run = [at[0]]
            if not completion[at[0]]:
                while len(run) < len(at) and not completion[at[len(run)]]:
                    run.append(at[len(run)])
            at = at[len(run) :]
            if completion[run[0]]:
                resident = torch.from_numpy(residency.slot_of >= 0)
                z = logits[run]
                result[run], _ = choice(z, *chosen_by(z), resident)
            needed, uses = result[run].unique(return_counts=True)
            for _ in residency.request_in_parts(needed.tolist(), uses.tolist()):
                pass
    return result


@pytest.mark.parametrize("seed", range(40))
def test_choices_are_those_of_decoding_token_by_token(seed):
    """Rows of packed texts, some with several turns; every choice as the runtime would make it."""
    torch.manual_seed(seed)
    rows, tokens = 2, 40
    capacity = int(torch.randint(TOP_K, EXPERTS + 1, ()))
    strength, keep = [0.05, 0.3, 2.0][seed % 3], seed % 4
    logits = 2 * torch.randn(rows, tokens, EXPERTS)
    segments = torch.zeros(rows, tokens, dtype=torch.int64)
    segments[:, 17:], segments[1, 30:] = 1, -1
    completion = torch.rand(rows, tokens) < 0.7
    completion[:, :4] = completion[:, 17:23] = False
    index, _ = chosen_by(logits)
    ours = index.numpy().copy()
    replaced, uses = prior_kernel.choose(
        logits.numpy(), ours, segments.numpy(), completion.numpy(), capacity, 0.9, strength, keep,
        prior_kernel.MEMORY,
    )  # fmt: skip
    for row in range(rows):
        wanted = decoded_one_by_one(
            logits[row], index[row], segments[row], completion[row], capacity, strength, keep
        )
        assert ours[row].tolist() == wanted.tolist()
    assert replaced == int((ours != index.numpy()).sum())
    assert uses == TOP_K * int((completion & (segments >= 0)).sum())
    if capacity < EXPERTS and strength > 1 and keep < TOP_K:
        assert replaced > 0


def test_a_token_that_skips_an_expert_keeps_its_choices():
    """An id equal to the number of experts means none; the others of that token are requested."""
    logits = np.array([[[3.0, 2.0, 1.0], [1.0, 3.0, 2.9]]], dtype=np.float32)
    chosen = np.array([[[0, 3], [1, 2]]])
    texts = np.zeros((1, 2), np.int64), np.ones((1, 2), bool)
    prior_kernel.choose(logits, chosen, *texts, 2, 0.9, 100.0, 1, prior_kernel.MEMORY)
    # Expert 0 is resident from the first token, and stands in for expert 2.
    assert chosen.tolist() == [[[0, 3], [1, 0]]]


@pytest.fixture
def prior_model():
    """A tiny OLMoE, its routers, and a batch of one padded and one full text."""
    torch.manual_seed(0)
    model = tiny_model("olmoe")
    routers = find_routers(model)
    ids = torch.randint(0, model.config.vocab_size, (2, 12))
    segments = torch.zeros(2, 12, dtype=torch.int64)
    segments[1, 9:] = -1
    completion = torch.zeros(2, 12, dtype=torch.bool)
    completion[:, 4:] = True
    completion &= segments >= 0
    capacity = {router.index: int(router.top_k) for router in routers}
    return model, routers, ids, Texts(segments, completion, capacity)


def test_only_completions_within_the_batch_change(prior_model):
    """Prompts, padding and passes outside keep the routers' choices and the model's logits."""
    model, routers, ids, texts = prior_model
    plain = model(ids).logits
    recorder = RoutingRecorder(routers)
    with recorder:
        model(ids)
    own = recorder.take()
    prior = PriorRouting(routers, 1.0, 0.9)
    with recorder, prior.during(texts):
        changed = model(ids).logits
    ran = recorder.take()
    outside = model(ids).logits
    with torch.no_grad(), prior.during(texts):
        another = model(ids).logits  # a teacher's pass, say
    prior.close()
    assert torch.equal(outside, plain)
    assert torch.equal(another, plain)
    assert not torch.equal(changed, plain)
    differs = (ran[0].top_k_index != own[0].top_k_index).any(-1).view(2, 12)
    assert differs.any()
    assert not differs[~texts.completion].any()
    # Up to the tiling of products whose groups have other sizes.
    torch.testing.assert_close(changed[:, :4], plain[:, :4])
    assert prior.uses == len(routers) * int(routers[0].top_k) * int(texts.completion.sum())
    assert 0 < prior.replaced < prior.uses


def test_changed_choices_have_the_routers_weights_with_their_gradient(prior_model):
    """The weights of a replaced choice are the softmax at its place, and train the router."""
    model, routers, ids, texts = prior_model
    seen = {}
    handle = routers[0].experts.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(zip("hiw", args, strict=True)), with_kwargs=True
    )
    recorder, prior = RoutingRecorder(routers), PriorRouting(routers, 1.0, 0.9)
    with recorder, prior.during(texts):
        model(ids)
    (first, *_) = recorder.take()
    p = first.logits.softmax(-1).gather(-1, seen["i"])
    if model.config.norm_topk_prob:
        p = p / p.sum(-1, keepdim=True)
    torch.testing.assert_close(seen["w"], p)
    (gradient,) = torch.autograd.grad(
        seen["w"].square().sum(), routers[0].weight, retain_graph=True
    )
    (wanted,) = torch.autograd.grad(p.square().sum(), routers[0].weight)
    torch.testing.assert_close(gradient, wanted)
    handle.remove()
    prior.close()


def test_recomputed_activations_run_the_same_choices(prior_model):
    """With gradient checkpointing, gradients equal those without it."""
    model, routers, ids, texts = prior_model
    prior = PriorRouting(routers, 1.0, 0.9)
    gradients = []
    for again in (False, True):
        if again:
            recompute(model, True)
        model.train()
        model.zero_grad()
        with prior.during(texts):
            loss = model(ids, use_cache=False).logits.square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    prior.close()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_router_that_saw_other_tokens_is_refused(prior_model):
    """Where logits and choices cannot be matched, nothing is guessed."""
    _, routers, _, texts = prior_model
    prior = PriorRouting(routers, 1.0, 0.9)
    hidden = torch.randn(24, 16)
    index = torch.zeros(24, int(routers[0].top_k), dtype=torch.int64)
    with pytest.raises(UnsupportedModelError, match="cache_prior 0"), prior.during(texts):
        routers[0].experts(hidden, index, index.float())
    prior.close()


def test_a_router_that_saw_another_number_of_tokens_than_the_batch_is_refused(prior_model):
    """As many as would still fit the batch's shape, too: whose tokens they are is not known."""
    model, routers, ids, texts = prior_model
    prior = PriorRouting(routers, 1.0, 0.9)
    said = "for 48 tokens of a batch of 24"
    with pytest.raises(UnsupportedModelError, match=said), prior.during(texts):
        model(torch.cat([ids, ids]))
    prior.close()
