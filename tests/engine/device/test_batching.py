"""transformers' continuous batching runs on the device engine, and no decode step asks the host."""

import pytest
import torch
from small_olmoe import tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from melinoe import attach
from melinoe.engine.device.experts import DeviceExperts
from melinoe.errors import AttachError

PROMPTS = [[3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13, 14]]
# transformers 5.17 calls it block_size.
PAGE = "page_size" if "page_size" in ContinuousBatchingConfig.__annotations__ else "block_size"
SMALL = {PAGE: 16, "num_blocks": 16, "max_batch_tokens": 32, "use_async_batching": False}
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def expected(model):
    """Each prompt by itself, on the plain model."""
    return [
        model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def batched(model, sequences):
    """Generate with so many sequences at once at most."""
    config = ContinuousBatchingConfig(
        **SMALL, max_requests_per_batch=sequences, q_padding_interval_size=1
    )
    outputs = model.generate_batch(
        PROMPTS, generation_config=GREEDY, continuous_batching_config=config, warmup=False
    )
    return [one.generated_tokens for one in outputs.values()]


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_batches_give_the_tokens_of_single_prompts(model, expected, slots):
    """One sequence at a time, two, and as many as come with everything resident."""
    with attach(model, engine="fast", slots=slots) as handle:
        assert batched(model, 8 if slots == 8 else slots // 2) == expected
        counters = handle.counters
    assert handle.fallbacks == 0
    # 12 prompt tokens and 15 others, whichever way they were batched.
    assert counters.tokens.sum() == 27
    if slots < 8:
        assert counters.tokens[1] > 0 and counters.chunked.sum() == 0


def test_prompts_of_others_evict_nobody(model):
    """Residents of the sequences that decode stay when a prompt is streamed between them."""
    with attach(model, engine="fast", slots=4) as handle:
        batched(model, 2)
        before = handle.resident()
        handle._passes._call, handle._passes.paged = None, True
        with torch.no_grad():
            layer = handle.layers[0].module
            layer(torch.randn(5, 16), torch.arange(10).reshape(5, 2) % 8, torch.rand(5, 2))
        assert set(before[0]) <= set(handle.resident()[0])
        handle._passes.paged = False


def test_a_capture_of_a_pass_that_needs_the_host_is_refused(model, monkeypatch):
    """A graph of it would replay one request's experts for every other."""
    monkeypatch.setattr(DeviceExperts, "_capturing", True)
    with (
        attach(model, engine="fast", slots=2),
        torch.no_grad(),
        pytest.raises(AttachError, match="CUDA graph"),
    ):
        model(torch.tensor([[3, 4, 5]]))


def test_padded_batches_are_still_planned_on_the_device(model, expected, monkeypatch):
    """CUDA graphs need padded batches; these are padded to no more than fits the slots."""
    from transformers.generation.continuous_batching import model_runner

    init = model_runner.ModelRunner.__init__

    def padding(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.pad_inputs = True

    monkeypatch.setattr(model_runner.ModelRunner, "__init__", padding)
    with attach(model, engine="fast", slots=4) as handle:
        assert batched(model, 2) == expected
        counters = handle.counters
    assert handle.fallbacks == 0
    assert counters.tokens.sum() == 27 and counters.tokens[1] >= 10


def test_decode_batches_that_do_not_fit_are_counted_and_named(model, expected, caplog):
    """Three sequences of two choices each in four slots, because the caller wants so."""
    with attach(model, engine="fast", slots=4) as handle:
        assert batched(model, 3) == expected
        assert handle.fallbacks > 0
    assert sum("raise the slots to 6" in r.getMessage() for r in caplog.records) == 1
