"""A prompt with a picture in it: the pictures' tokens choose experts like any others."""

import pytest
import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from melinoe import attach
from melinoe.cache.prefetch import prefetcher
from melinoe.cache.simulator import simulate

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
@pytest.mark.parametrize("name", ["next-router", "prefill"])
def test_a_picture_is_read_as_without_us_and_counted_as_simulated(model, policy, name):
    """Tokens equal the plain model's for two pictures, which differ; counters the simulator's."""
    pictures = [torch.randn(16, 96, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    plain = [answer(model, one) for one in pictures]
    assert not torch.equal(*plain)  # the picture is looked at
    chosen = prefetcher(name)
    with attach(model, slots=3, policy=policy) as handle:
        with handle.record(guesses=name == "next-router") as recorder:
            for one, expected in zip(pictures, plain, strict=True):
                with handle.prefetching(chosen):
                    assert torch.equal(answer(model, one), expected)
        counted, trace = handle.counters, recorder.trace()
    assert counted.tokens.tolist() == [2 * 12, 2 * 11]
    assert counted.prefetch_loads.sum() > 0
    assert simulate(trace, 3, policy, prefetch=chosen).counters == counted
