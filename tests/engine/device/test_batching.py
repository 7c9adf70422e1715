"""transformers' continuous batching runs on the fast engine, and no decode step asks the host."""

import pytest
import torch
from small_olmoe import tiny_model
from transformers import ContinuousBatchingConfig, GenerationConfig

from melinoe import attach
from melinoe.engine.device import experts as experts_module
from melinoe.engine.device import passes as passes_module
from melinoe.engine.device.batching import batching_config
from melinoe.errors import AttachError, BudgetError

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


def batched(model, config):
    outputs = model.generate_batch(
        PROMPTS, generation_config=GREEDY, continuous_batching_config=config, warmup=False
    )
    return [one.generated_tokens for one in outputs.values()]


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_batches_give_the_tokens_of_single_prompts(model, expected, slots):
    """One sequence at a time, two, and as many as come with everything resident."""
    with attach(model, engine="fast", slots=slots) as handle:
        config = batching_config(handle, 2, **SMALL)
        assert config.max_requests_per_batch == {2: 1, 4: 2, 8: None}[slots]
        assert batched(model, config) == expected
        counters = handle.counters
    assert handle.fallbacks == 0
    # 12 prompt tokens and 15 others, whichever way they were batched.
    assert counters.tokens.sum() == 27
    if slots < 8:
        assert counters.tokens[1] > 0 and counters.chunked.sum() == 0


def test_prompts_of_others_evict_nobody(model):
    """Residents of the sequences that decode stay when a prompt is streamed between them."""
    with attach(model, engine="fast", slots=4) as handle:
        batched(model, batching_config(handle, 2, **SMALL))
        before = handle.resident()
        handle._passes._call, handle._passes.paged = None, True
        with torch.no_grad():
            layer = handle.layers[0].module
            layer(torch.randn(5, 16), torch.arange(10).reshape(5, 2) % 8, torch.rand(5, 2))
        assert set(before[0]) <= set(handle.resident()[0])
        handle._passes.paged = False


def test_too_few_slots_for_a_token_are_refused(model):
    """By the number that works."""
    with (
        attach(model, engine="fast", slots=1) as handle,
        pytest.raises(BudgetError, match="2 or more"),
    ):
        batching_config(handle, 2)


def test_a_capture_of_a_pass_that_needs_the_host_is_refused(model, monkeypatch):
    """A graph of it would replay one request's experts for every other."""
    monkeypatch.setattr(experts_module, "_capturing", lambda device: True)
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
        assert batched(model, batching_config(handle, 2, **SMALL)) == expected
        counters = handle.counters
    assert handle.fallbacks == 0
    assert counters.tokens.sum() == 27 and counters.tokens[1] >= 10


def test_decode_batches_that_do_not_fit_are_counted_and_named(model, expected, caplog):
    """Three sequences of two choices each in four slots, because the caller wants so."""
    with attach(model, engine="fast", slots=4) as handle:
        config = batching_config(handle, 2, **SMALL, max_requests_per_batch=3)
        assert batched(model, config) == expected
        assert handle.fallbacks > 0
    assert sum("raise the slots to 6" in r.getMessage() for r in caplog.records) == 1


def test_batches_that_nobody_captures_are_named(model, monkeypatch, caplog):
    """Many decode batches in a row, none between them a prompt's."""
    monkeypatch.setattr(passes_module, "_MANY", 4)
    with attach(model, engine="fast", slots=4, graphs=True) as handle:
        batched(model, batching_config(handle, 2, **SMALL))
    assert sum("no block tables" in r.getMessage() for r in caplog.records) == 1
    caplog.clear()
    monkeypatch.setattr(passes_module, "_MANY", 64)  # fewer may be warming up
    with attach(model, engine="fast", slots=4, graphs=True) as handle:
        batched(model, batching_config(handle, 2, **SMALL))
    assert not caplog.records


def test_what_is_captured_is_never_more_than_the_device_counts(model, monkeypatch):
    """65,535 choices: of 2 a token transformers' own 8,192 tokens, of 8 fewer, unless asked for."""
    with attach(model, engine="fast", slots=8) as handle:
        monkeypatch.setattr(handle, "device", torch.device("cuda"))
        for top_k, asked, tokens, graphs in (
            (2, {}, 8192, (True, True)),
            (8, {}, 8128, (True, True)),
            (8, {"max_batch_tokens": 8191}, 8191, (True, True)),
            (8, {"max_batch_tokens": 8192}, 8192, (False, True)),
        ):
            config = batching_config(handle, top_k, **asked)
            assert (config.max_batch_tokens, config.use_cuda_graph) == (tokens, graphs)
    with attach(model, engine="fast", slots=4) as handle:
        monkeypatch.setattr(handle, "device", torch.device("cuda"))
        assert batching_config(handle, 2).use_cuda_graph == (False, True)
