"""
Every decorated family that generates decodes from captured steps, or says why it does not.

The steps are played by a tape (see tape.py): without their Python, as from a CUDA graph.
"""

import pytest
import tape
import tiny
import torch
from fast_attach import attach
from replayed import static

from melinoe.engine.device.static_cache import why_not_static

# A padded row and one that is not; half the slots, so that captured steps load.
IDS = torch.tensor([[0, 5, 6, 7], [9, 3, 4, 11]])
SLOTS, TOKENS, WINDOW = 4, 6, 6

NO_STATIC_CACHE = {"deepseek_v4": "has no static cache", "minimax": "looks at values"}
NOT_CAPTURED = {
    "inkling": "asks its cache for a number of tokens",
    "inkling2": "asks its cache for a number of tokens",
    "qwen4_exp": "other memory in StaticIndexedLayer",
    "unlimited_ocr": "asks its cache for a number of tokens",
}
# It writes whole blocks of text at once and has no decode step.
DIFFUSION = "diffusion_gemma"


def generates(family):
    return hasattr(tiny._model_class(family), "generate") and family != DIFFUSION


def generate(model):
    """Logits of every step, of texts that do not end."""
    options = {"eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    return torch.stack(static(model, IDS, TOKENS, **options).logits)


def built(family):
    """With a window that fills up on the way, where the family has one."""
    text = tiny.tiny_model(family).config.get_text_config(decoder=True)
    windowed = getattr(text, "sliding_window", None) is not None
    return tiny.tiny_model(family, **({"sliding_window": WINDOW} if windowed else {}))


@pytest.mark.parametrize("family", [f for f in tiny.families() if generates(f)])
def test_captured_steps_give_the_bits_and_counts_of_plain_ones(family):
    """Logits of every step and all counters, in two calls; the second finds all captured."""
    model = built(family)
    if family in NO_STATIC_CACHE:
        assert NO_STATIC_CACHE[family] in why_not_static(type(model), model.config)
        return
    with attach(model, slots=SLOTS, graphs=False) as handle:
        expected = generate(model)
        counted = handle.counters
    with attach(model, slots=SLOTS, graphs=True) as handle:
        tape.play(handle)
        for _ in range(2):
            handle.reset_cache()
            handle.reset_counters()
            assert torch.equal(generate(model), expected)
            assert handle.counters == counted
        graphs = handle.graphs
        if family in NOT_CAPTURED:
            assert any(NOT_CAPTURED[family] in said for said in graphs._warned)
            assert graphs.replayed == 0
            return
        assert graphs.reason is None and handle.fallbacks == 0
        kinds = graphs.captured
        assert kinds in (1, 2) and graphs.replayed == 2 * (TOKENS - 1) - kinds
        assert counted.uses[1].sum() > 0
