"""Prefetch in models whose passes leave layers out, or whose layers differ."""

import numpy as np
import pytest
import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from melinoe import attach
from melinoe.cache.locality import popularity
from melinoe.cache.prefetch import Given, Prompt, most_wanted, prefetcher
from melinoe.cache.simulator import simulate
from melinoe.generate import generate, prompt_ids, trace_prompts
from melinoe.predictor import FitSettings, compare, fit
from tests import small_olmoe

IMAGE, BEFORE, AFTER = 120, 122, 123
TEXT = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1,
    rope_scaling=dict(rope_type="default", mrope_section=[2, 1, 1], mrope_interleaved=True),
)  # fmt: skip
EYES = dict(
    depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4,
    spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32,
    num_position_embeddings=16, deepstack_visual_indexes=[0],
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(
        text_config=TEXT, vision_config=EYES, image_token_id=IMAGE, video_token_id=121,
        vision_start_token_id=BEFORE, vision_end_token_id=AFTER,
    )  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(config).eval()


def answer(model, picture):
    """Twelve tokens after three words, a picture of 4 x 4 patches in 4 tokens, and three words."""
    ids = torch.tensor([[1, 2, 3, BEFORE, *[IMAGE] * 4, AFTER, 5, 6, 7]])
    return model.generate(
        ids, pixel_values=picture, image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=(ids == IMAGE).int(), max_new_tokens=12, do_sample=False, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_picture_is_read_as_without_us_and_counted_as_simulated(model, policy):
    """Tokens equal the plain model's for two pictures, which differ; counters the simulator's."""
    pictures = [torch.randn(16, 96, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    plain = [answer(model, one) for one in pictures]
    assert not torch.equal(*plain)  # the picture is looked at
    chosen = prefetcher("prefill")
    with attach(model, slots=3, policy=policy) as handle:
        with handle.record() as recorder:
            for one, expected in zip(pictures, plain, strict=True):
                with handle.prefetching(chosen):
                    assert torch.equal(answer(model, one), expected)
        counted, trace = handle.counters, recorder.trace()
    assert counted.tokens.tolist() == [2 * 12, 2 * 11]
    assert counted.prefetch_loads.sum() > 0
    assert simulate(trace, 3, policy, prefetch=chosen).counters == counted


FEWER, SLOTS = 3, 6
TEXTS = [[3 + number, 2 + (5 * number) % 30] for number in range(22)]


@pytest.fixture(scope="module")
def uneven():
    """Eight experts in layer 0, three in layer 1; and a trace of 22 texts, on all of them."""
    model, tokenizer = small_olmoe.tiny_model(), small_olmoe.words_tokenizer()
    block = model.model.layers[1].mlp
    for owner, names in ((block.experts, ("gate_up_proj", "down_proj")), (block.gate, ("weight",))):
        for name in names:
            whole = getattr(owner, name)
            setattr(owner, name, torch.nn.Parameter(whole[:FEWER].detach().clone()))
        owner.num_experts = FEWER
    with attach(model, slots=8) as handle:
        trace = trace_prompts(model, handle, tokenizer, TEXTS, 6)
    assert trace.num_experts == 8 and trace.experts[:, 1].max() < FEWER
    return model, tokenizer, trace


def quick(trace, model):
    """A predictor fitted for the number of slots."""
    embeddings = model.get_input_embeddings().weight
    return fit(trace, TEXTS, embeddings, SLOTS, settings=FitSettings(hidden=8, epochs=3))


def test_what_is_wanted_most_is_named_and_what_nobody_chose_is_not():
    """Counts 2, 0, 5, 2 and three slots: 2, then 0 and 3; known ones of a score of 0 as well."""
    wanted = np.array([[2, 0, 5, 2], [0, 1, 0, 0]])
    assert most_wanted(wanted, 3) == [[2, 0, 3], [1]]
    known = np.array([[True, True, False, True], [True, True, False, False]])
    assert most_wanted(wanted, 3, known) == [[0, 3, 1], [1, 0]]
    assert most_wanted(-wanted, 2, known) == [[1, 0], [0, 1]]


def test_no_strategy_names_an_expert_that_its_layer_does_not_have(uneven):
    """Six slots, three experts: popularity and predictor name those."""
    model, _, trace = uneven
    predictor = quick(trace, model)
    given = Given(popularity(trace), predictor)
    named = [predictor.top([3, 4], SLOTS)]
    for name in ("popularity", "predictor"):
        one = prefetcher(name, given)
        one.bind(model)
        named.append(
            one.before_completion(Prompt((SLOTS, FEWER), 8, (3, 4), np.zeros((2, 8), int)))
        )
    for first, second in named:
        assert len(first) == SLOTS and 0 < len(second) <= FEWER
        assert max(second) < FEWER and len(set(second)) == len(second)


@pytest.mark.parametrize("name", ["popularity", "prefill", "predictor"])
@pytest.mark.parametrize("slots", [SLOTS, 2])
def test_served_and_simulated_counts_agree_where_layers_differ(uneven, name, slots):
    """Six slots of eight experts, and all three of three: the same loads on both sides."""
    model, tokenizer, trace = uneven
    ids = [prompt_ids(tokenizer, one) for one in TEXTS[:3]]
    chosen = prefetcher(name, Given(popularity(trace), quick(trace, model)))
    with attach(model, slots=slots, policy="lfu") as handle:
        with handle.record() as recorder:
            for one in ids:
                generate(model, handle, tokenizer, one, 6, prefetch=chosen)
        counted, own = handle.counters, recorder.trace()
    assert simulate(own, slots, "lfu", prefetch=chosen, prompts=ids).counters == counted
    if slots == 2:
        assert counted.prefetch_loads.sum() > 0


def test_rivals_are_compared_where_layers_differ(uneven):
    """More slots than a layer has experts: every guess serves all of it, and costs no more."""
    model, _, trace = uneven
    embeddings = model.get_input_embeddings().weight
    settings = FitSettings(hidden=8, epochs=2)
    found = compare(trace, TEXTS, embeddings, SLOTS, folds=2, settings=settings)
    # Layer 1 has three experts that stay once they came, so at most half of all is ever missed.
    assert found.recall["popularity"].mean >= 0.5 and found.ceiling.mean >= 0.5
    uses = 2 * 2
    assert all(0 <= one.mean <= uses for one in found.transfers.values())


def test_a_layer_that_no_text_uses_is_no_reason_to_refuse_a_trace(uneven):
    """Layer 1 left out of the trace: the predictor names nothing there, and recall is layer 0's."""
    from dataclasses import replace

    model, _, trace = uneven
    experts = trace.experts.copy()
    experts[:, 1] = -1
    predictor = quick(replace(trace, experts=experts), model)
    first, second = predictor.top([3, 4], SLOTS)
    assert len(first) == SLOTS and second == []
