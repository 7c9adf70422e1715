"""The device engine computes what the model computes, and counts what the simulator counts."""

import copy

import pytest
import tiny
import torch
from fast_attach import attach

from melinoe.cache.policy import Static
from melinoe.cache.prefetch import Popularity
from melinoe.cache.residency import StreamedPrefill
from melinoe.cache.simulator import simulate
from melinoe.engine.device.copying import Loader
from melinoe.errors import AttachError, BudgetError
from melinoe.moe.experts import find_experts

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
BATCH = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 9, 3, 4], [2, 3, 4, 5]])
MASK = (BATCH != 0).long()
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
WAYS = {
    "one": {"inputs": PROMPT, **GREEDY},
    "batch with padding": {"inputs": BATCH, "attention_mask": MASK, **GREEDY},
    "beam": {"inputs": BATCH[:2], "attention_mask": MASK[:2], **GREEDY, "num_beams": 2},
}


@pytest.fixture(scope="module")
def original():
    return {
        dtype: tiny.tiny_model("olmoe", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }


@pytest.fixture(params=["float32", "bfloat16"])
def any_model(original, request):
    return original[getattr(torch, request.param)]


@pytest.fixture
def model(original):
    return copy.deepcopy(original[torch.float32])


def generate(model, way):
    torch.manual_seed(3)
    return model.generate(**WAYS[way])


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_tokens_and_logits_equal_all_resident(any_model, slots):
    """Bit for bit, whether steps fit the slots (2 and more) or need the host (1)."""
    tokens = generate(any_model, "one")
    with torch.no_grad():
        logits = any_model(tokens).logits
    with attach(any_model, slots=slots) as handle, torch.no_grad():
        assert torch.equal(generate(any_model, "one"), tokens)
        assert torch.equal(any_model(tokens).logits, logits)
        assert handle.fallbacks == (7 if slots == 1 else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("policy", "slots"), [("lru", 2), ("lfu", 4), ("lru", 8), ("lfu", 8)])
def test_simulated_counts_equal_measured_counts(model, way, policy, slots):
    """Streamed prompts, device steps and steps with the host, padding and beams included."""
    expected = generate(model, way)
    with attach(model, slots=slots, policy=policy) as handle:
        with handle.record() as recorder:
            assert torch.equal(generate(model, way), expected)
        counted = handle.counters
        trace = recorder.trace()
        assert simulate(trace, slots, policy, prefill=handle.prefill).counters == counted
        assert counted.tokens[1] == 7 * len(BATCH) if way != "one" else counted.tokens[1] == 7
        moved = counted.loads.sum() * handle.store.block_bytes(0)
        assert handle.transferred_bytes == moved
        handle.reset_counters()
        assert handle.counters.uses.sum() == 0


@pytest.mark.usefixtures("two_groups")
@pytest.mark.parametrize(("policy", "slots", "format"), [("lfu", 3, None), ("lru", 2, "int4")])
def test_the_kernels_themselves_serve_a_model(model, interpreted, policy, slots, format):
    """Tokens and counts of kernels run by Triton's interpreter; other tests compute by numpy."""
    few = WAYS["one"] | {"max_new_tokens": 3}
    with attach(model, slots=slots, policy=policy, format=format) as handle:
        with handle.record() as recorder:
            tokens = model.generate(**few)
        counted, trace = handle.counters, recorder.trace()
        assert simulate(trace, slots, policy, prefill=handle.prefill).counters == counted
        assert counted.loads[1].sum() > 0
    # Detached, it holds the weights of the codes.
    assert torch.equal(model.generate(**few), tokens)


@pytest.mark.parametrize("admit", [0, 1, None])
def test_prompts_never_evict_more_than_they_may(model, admit):
    """Another prompt in between: none it uses leaves, and at most *admit* others; as simulated."""
    other = PROMPT + 17
    with attach(model, slots=4, admit=admit) as handle, handle.record() as recorder:
        generate(model, "one")
        before = handle.resident()
        with torch.no_grad():
            model(other)
        after = handle.resident()
        counted = handle.counters
    trace = recorder.trace()
    prompt = trace.experts[trace.forward == trace.num_forwards - 1]
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        used = set(prompt[:, layer].ravel().tolist())
        gone = set(old) - set(new)
        assert len(old) == len(new) == 4 < len(used)
        assert not gone & used
        # More are used than there are slots: without a limit all that are not used make room.
        assert gone == set(old) - used if admit is None else len(gone) <= admit
    assert simulate(trace, 4, prefill=StreamedPrefill(admit)).counters == counted


@pytest.mark.parametrize("staging_experts", [1, 2, 8])
def test_staging_of_any_size_gives_the_same_bits(any_model, staging_experts):
    """Rounds of one, of two, and one round for all."""
    expected = generate(any_model, "batch with padding")
    with attach(any_model, slots=2, admit=0, staging_experts=staging_experts) as handle:
        assert torch.equal(generate(any_model, "batch with padding"), expected)
        assert handle.engine.staging.nbytes == 2 * staging_experts * handle.store.block_bytes(0)


def test_prefetches_count_apart_and_agree(model):
    """When the completion begins, as the simulator says."""
    ahead = Popularity([[9, 8, 0, 7, 6, 0, 0, 0], [0, 0, 9, 0, 0, 0, 8, 7]])
    with attach(model, slots=4, policy="lfu", policy_options={"gamma": 0.8}) as handle:
        with handle.record() as recorder:
            for sequence in (0, 1):
                with handle.prefetching(ahead):
                    model.generate(PROMPT + sequence, **GREEDY)
        counted = handle.counters
    simulated = simulate(
        recorder.trace(), 4, "lfu", prefetch=ahead, policy_options={"gamma": 0.8},
        prefill=StreamedPrefill(),
    ).counters  # fmt: skip
    assert simulated == counted
    assert counted.prefetch_loads.sum() > 0


def test_unused_slots_never_leak(model):
    """NaN in every slot and staging block that nothing was loaded into changes nothing."""
    expected = generate(model, "one")
    with attach(model, slots=5) as handle:
        for cache in handle._caches:
            for tensor in (
                *cache.slots.values(),
                *handle.engine.staging.blocks(cache.layer)[0].values(),
            ):
                tensor.fill_(float("nan"))
        assert torch.equal(generate(model, "one"), expected)
        handle.reset_cache()
        for cache in handle._caches:
            for tensor in cache.slots.values():
                tensor.fill_(float("nan"))
        assert torch.equal(generate(model, "one"), expected)


def test_a_stale_slot_would_show(model):
    """The control of the tests above: slots with another expert's weights change the logits."""
    with attach(model, slots=8) as handle, torch.no_grad():
        expected = model(PROMPT).logits
        for cache in handle._caches:
            for tensor in cache.slots.values():
                tensor.copy_(tensor.roll(1, 0))
        assert not torch.allclose(model(PROMPT).logits, expected)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "qwen3_moe", "deepseek_v3", "zaya"])
def test_other_layouts_equal_all_resident(family):
    """Biases, transposed and interleaved weights, no gate, shared experts, one choice a token."""
    network = tiny.tiny_model(family)
    network.set_experts_implementation("grouped_mm")
    layers = find_experts(network)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        prompt = network(ids, use_cache=True)
        expected = network(ids[:, :1], past_key_values=prompt.past_key_values).logits
        with attach(network, slots=min(4, layers[0].num_experts)) as handle:
            fast = network(ids, use_cache=True)
            assert torch.equal(fast.logits, prompt.logits)
            again = network(ids[:, :1], past_key_values=fast.past_key_values).logits
            assert torch.equal(again, expected)
            assert handle.counters.tokens.tolist() == [3, 1]


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4", "fp8"])
def test_codes_serve_the_weights_that_they_stand_for(format):
    """The logits of the decoded weights up to bfloat16, and one and the same at any slots."""
    network = tiny.tiny_model("olmoe", dtype=torch.bfloat16)
    exact = network(PROMPT).logits.detach()
    found = []
    with torch.no_grad():
        for slots in (1, 4, 8):
            with attach(network, slots=slots, format=format) as handle:
                blocks = slots * sum(handle.store.block_bytes(layer) for layer in range(2))
                assert handle.expert_memory_bytes == blocks
                found.append((generate(network, "batch with padding"), network(PROMPT).logits))
                assert handle.audit() > 0
        # Detached, the model holds the decoded weights.
        decoded = network(PROMPT).logits
    for tokens, logits in found[1:]:
        assert torch.equal(tokens, found[0][0]) and torch.equal(logits, found[0][1])
    assert (logits - decoded).abs().max() < 0.05 * decoded.abs().max()
    assert not torch.equal(decoded, exact)


def test_detach_restores_weights_bit_for_bit(model):
    """And generate, the compiled call and the static cache are transformers' own again."""
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    own = set(vars(model))
    config = model.generation_config.to_dict()
    handle = attach(model, slots=2, graphs=True)
    generate(model, "one")
    handle.detach()
    assert set(vars(model)) == own
    assert model.generation_config.to_dict() == config
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_failure_in_a_step_leaves_the_next_one_right(model):
    """It strikes a prompt or a decode step; no slot is trusted afterwards."""
    expected = generate(model, "one")
    with attach(model, slots=3) as handle:
        for strike in (1, 4):
            cache = handle._caches[1]
            grouped, of_few, calls = cache._forward, cache._of_few, [0]

            def broken(*args, strike=strike, calls=calls, grouped=grouped):
                calls[0] += 1
                if calls[0] == strike:
                    raise torch.OutOfMemoryError("out of memory")
                return grouped(*args)

            cache._forward = cache._of_few = broken
            with pytest.raises(torch.OutOfMemoryError):
                generate(model, "one")
            cache._forward, cache._of_few = grouped, of_few
            assert handle.resident() == [[], []]
            assert torch.equal(generate(model, "one"), expected)


def test_steps_that_may_not_fit_are_counted_and_logged_once(model, caplog):
    """Four tokens of two choices may need eight experts of four slots."""
    expected = generate(model, "batch with padding")
    with attach(model, slots=4) as handle:
        assert torch.equal(generate(model, "batch with padding"), expected)
        assert torch.equal(generate(model, "batch with padding"), expected)
        assert handle.fallbacks == 14
    assert [r.getMessage() for r in caplog.records if "the host decides" in r.getMessage()] != []
    assert sum("the host decides" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"slots": 9}, BudgetError, "between 1 and 8"),
        ({"slots": 2, "policy": "belady"}, Exception, "belady"),
        ({"slots": 2, "policy": lambda: Static([0.0] * 8)}, AttachError, "lru or lfu"),
        ({"slots": 2, "format": "int3"}, AttachError, "int8.*int4"),
    ],
)
def test_bad_settings_are_refused_before_anything_moves(model, arguments, error, message):
    """The model works as before."""
    expected = generate(model, "one")
    with pytest.raises(error, match=message):
        attach(model, **arguments)
    assert torch.equal(generate(model, "one"), expected)


def test_gradients_and_casts_are_refused(model):
    """The errors are the reference engine's."""
    with attach(model, slots=2):
        with pytest.raises(AttachError, match=r"torch\.no_grad"):
            model(PROMPT)
        model.to(torch.bfloat16)
        with pytest.raises(AttachError, match="moved or cast"):
            generate(model, "one")
        model.to(torch.float32)


def test_layers_that_compute_other_numbers_of_tokens_are_other_passes(model):
    """One token fits two slots, five do not: the second layer's pass asks the host, as it must."""
    first, second = (layer.module for layer in find_experts(model))
    torch.manual_seed(0)
    one = torch.randn(1, 32), torch.tensor([[3, 5]]), torch.rand(1, 2)
    five = torch.randn(5, 32), torch.arange(10).reshape(5, 2) % 8, torch.rand(5, 2)
    with torch.no_grad():
        expected = first(*one), second(*five)
        with attach(model, slots=2) as handle:
            found = first(*one), second(*five)
            assert all(map(torch.equal, found, expected))
            assert handle.counters.uses.sum(axis=1).tolist() == [10, 2]


def test_reading_who_is_resident_disturbs_no_pass(model, monkeypatch):
    """As another thread may, in the midst of passes that the host decides: the same logits."""
    load, seen = Loader.load, []

    def looked_at(self, pairs):
        load(self, pairs)
        seen.append(handle.resident())
        assert [handle.resident_count(layer) for layer in (0, 1)] == list(map(len, seen[-1]))

    for slots, ids in ((1, PROMPT[:, :1]), (3, PROMPT)):
        with torch.no_grad():
            expected = model(ids).logits
            with attach(model, slots=slots) as handle, monkeypatch.context() as patch:
                patch.setattr(Loader, "load", looked_at)
                for _ in range(2):
                    assert torch.equal(model(ids).logits, expected)
                assert seen and handle.audit() > 0
                assert list(map(len, handle.resident())) == [slots] * 2
