"""Decode steps as CUDA graphs: replays are what ran, and graphs come, go and fail."""

import pytest
import tiny
import torch
from on_cuda import EXPERTS, TOP_K, generate, model

import melinoe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_captured_steps_give_the_tokens_of_plain_ones(batch):
    """generate with a static cache; replays are what ran, and counters go on."""
    network = model()
    with melinoe.attach(network, engine="fast", slots=EXPERTS, graphs=False):
        expected = generate(network, batch=batch, cache_implementation="static")
    with melinoe.attach(network, engine="fast", slots=EXPERTS) as handle:
        for _ in range(3):
            assert torch.equal(generate(network, batch=batch), expected)
        assert handle.graphs.reason is None
        assert handle.graphs.captured == 1 and handle.graphs.replayed > 100
        assert handle.counters.tokens[1] == 3 * 47 * batch
    with melinoe.attach(network, engine="fast", slots=min(EXPERTS, TOP_K * batch)) as handle:
        for _ in range(2):
            assert torch.equal(generate(network, batch=batch), expected)
        assert handle.graphs.reason is None and handle.fallbacks == 0


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt_oss", {"sliding_window": 32}),  # fills up on the way
        ("gemma4", {}),
        ("qwen3_next", {}),
        ("deepseek_v3", {}),
        ("glm_moe_dsa", {}),
        ("granitemoehybrid", {}),
    ],
)
def test_other_caches_are_replayed_too(family, options):
    """Windows, linear, latent and indexed attention: captured steps give the tokens of plain."""
    network = tiny.tiny_model(family, dtype=torch.bfloat16, **options).to("cuda")
    network.set_experts_implementation("grouped_mm")
    network.generation_config.eos_token_id = None
    settings = {"output_logits": True, "return_dict_in_generate": True}
    with melinoe.attach(network, engine="fast", slots=8, graphs=False):
        expected = torch.stack(
            generate(network, 32, cache_implementation="static", **settings).logits
        )
    with melinoe.attach(network, engine="fast", slots=8) as handle:
        for _ in range(2):
            found = torch.stack(generate(network, 32, **settings).logits)
            assert torch.equal(found, expected)
        assert handle.graphs.reason is None
        assert handle.graphs.captured == len(options) + 1


def test_longer_texts_are_captured_anew():
    """Each needs a longer cache, so the graphs before are gone; and another model's come and go."""
    network, other = model(), model(seed=1)
    with melinoe.attach(network, engine="fast", slots=8) as handle:
        for captured, tokens in enumerate((16, 32, 64), start=1):
            with handle.graphs.paused():
                expected = generate(network, tokens, cache_implementation="static")
            with melinoe.attach(other, engine="fast", slots=8) as second:
                generate(other, 16)
                for _ in range(2):
                    assert torch.equal(generate(network, tokens), expected)
                assert second.graphs.reason is None and second.graphs.captured == 1
            assert torch.equal(generate(network, tokens), expected)
            assert handle.graphs.reason is None
            assert handle.graphs.captured >= captured


def test_a_failed_capture_is_named_and_others_succeed():
    """
    A wait inside a capture that no step before showed: the text goes on, and so does the process.

    Afterwards another model's steps are captured, sampling works, and memory comes back.
    """
    network, other = model(), model(seed=1)
    with melinoe.attach(network, engine="fast", slots=8, graphs=False):
        expected = generate(network, cache_implementation="static")

    def waits_when_captured(_, __, output):
        if torch.cuda.is_current_stream_capturing():
            output.sum().item()

    hook = network.lm_head.register_forward_hook(waits_when_captured)
    with melinoe.attach(network, engine="fast", slots=8) as handle:
        for _ in range(2):
            assert torch.equal(generate(network), expected)
        assert "captur" in handle.graphs.reason and handle.graphs.replayed == 0
    hook.remove()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.rand(4, device="cuda").isfinite().all()
    for again in (network, other):
        with melinoe.attach(again, engine="fast", slots=8) as handle:
            generate(again)
            assert handle.graphs.reason is None and handle.graphs.captured == 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    large = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    large.record_stream(side)
    del large
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before


def test_a_step_that_waits_is_never_captured():
    """A hook asks the device what it holds; that shows before a capture is tried."""
    network = model()
    with melinoe.attach(network, engine="fast", slots=8, graphs=False):
        expected = generate(network, cache_implementation="static")
    network.lm_head.register_forward_hook(lambda _, __, output: output.sum().item() and None)
    with melinoe.attach(network, engine="fast", slots=8) as handle:
        for _ in range(2):
            assert torch.equal(generate(network), expected)
        assert (handle.graphs.captured, handle.graphs.replayed) == (0, 0)
        assert handle.graphs.reason is None  # no capture failed: none was tried


def test_one_slot_and_one_choice_are_never_captured():
    """With one group transformers' counting of rows waits for the host."""
    network = model(num_experts_per_tok=1)
    with melinoe.attach(network, engine="fast", slots=1, graphs=False):
        expected = generate(network, cache_implementation="static")
    with melinoe.attach(network, engine="fast", slots=1) as handle:
        for _ in range(2):
            assert torch.equal(generate(network), expected)
        assert handle.graphs.reason is None


def test_a_model_that_changes_is_captured_anew():
    """Other weights in other memory."""
    network = model()
    with melinoe.attach(network, engine="fast", slots=8) as handle:
        before = generate(network)
        own = network.lm_head.weight
        network.lm_head.weight = torch.nn.Parameter(own.detach().flip(0), requires_grad=False)
        with handle.graphs.paused():
            expected = generate(network, cache_implementation="static")
        assert torch.equal(generate(network), expected)
        assert torch.equal(generate(network), expected)
        network.lm_head.weight = own
        assert torch.equal(generate(network), before)
        assert handle.graphs.reason is None
