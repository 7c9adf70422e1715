"""The runtime computes what the model computes, counts what the simulator counts, and leaves."""

import pytest
import tiny
import torch
from transformers import TextStreamer

from melinoe import attach
from melinoe.cache.prefetch import Listed
from melinoe.cache.simulator import simulate
from melinoe.engine.transfer import EmulatedLink
from melinoe.errors import AttachError, BudgetError, MelinoeError, UnsupportedModelError
from melinoe.moe.experts import find_experts

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])
BATCH = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 9, 3, 4]])  # 0 is padding, on the left
MASK = (BATCH != 0).long()
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
WAYS = {
    "greedy": {"inputs": PROMPT, **GREEDY},
    "sampling": {"inputs": PROMPT, **GREEDY, "do_sample": True, "top_k": 0},
    "batch with padding": {"inputs": BATCH, "attention_mask": MASK, **GREEDY},
    "beam": {"inputs": BATCH, "attention_mask": MASK, **GREEDY, "num_beams": 3},
}


def generate(model, way):
    torch.manual_seed(3)
    return model.generate(**WAYS[way])


@pytest.mark.parametrize("slots", range(1, tiny.NUM_EXPERTS + 1))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_and_logits_equal_all_resident(model, bf16_model, slots, dtype):
    """At every number of slots the bits are those of transformers' own function."""
    model = model if dtype == "float32" else bf16_model
    tokens = generate(model, "greedy")
    with torch.no_grad():
        logits = model(tokens).logits
    with attach(model, slots=slots), torch.no_grad():
        assert torch.equal(generate(model, "greedy"), tokens)
        assert torch.equal(model(tokens).logits, logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8])
def test_simulated_counts_equal_measured_counts(model, way, policy, slots):
    """Prefill, padding and beams included; and the tokens are those without offloading."""
    expected = generate(model, way)
    with attach(model, slots=slots, policy=policy) as handle:
        with handle.record() as recorder:
            assert torch.equal(generate(model, way), expected)
        counted = handle.counters
    trace = recorder.trace()
    assert simulate(trace, slots, policy).counters == counted
    assert counted.hits.sum() + counted.loads.sum() > 0
    # The first pass computes the prompt, each later one a token per row.
    rows = len(expected) * (3 if way == "beam" else 1)
    length = WAYS[way]["inputs"].shape[1]
    assert counted.tokens[0] == rows * length
    assert counted.tokens[1] == rows * 7


def test_simulated_counts_equal_measured_counts_with_prefetch(model):
    """Two prompts, each with a prefetch: loads ahead of need count apart, and agree."""
    wanted = {0: [[3, 1, 4], [2, 7]], 1: [[0], [6, 5, 1]]}
    with attach(model, slots=3, policy="lfu", policy_options={"gamma": 0.8}) as handle:
        with handle.record() as recorder:
            for sequence in (0, 1):
                with handle.prefetching(Listed({None: wanted[sequence]})):
                    model.generate(PROMPT + sequence, **GREEDY)
        counted, moved = handle.counters, handle.transferred_bytes
    simulated = simulate(
        recorder.trace(),
        3,
        "lfu",
        prefetch=Listed(wanted),
        policy_options={"gamma": 0.8},
    ).counters
    assert simulated == counted
    # An expert is 2*16*32 + 32*16 floats.
    assert counted.prefetch_loads.sum() > 0
    assert moved == (counted.loads.sum() + counted.prefetch_loads.sum()) * 4 * block_floats(model)


def block_floats(model):
    config = model.config
    return 3 * config.hidden_size * config.intermediate_size


def test_a_trace_is_the_same_with_all_experts_resident_and_with_few(model):
    """What the routers choose does not depend on where the experts are."""
    traces = []
    for slots in (2, tiny.NUM_EXPERTS):
        with attach(model, slots=slots) as handle, handle.record() as recorder:
            generate(model, "batch with padding")
        traces.append(recorder.trace())
    few, all_resident = traces
    for name in ("experts", "forward", "sequence", "kind"):
        assert (getattr(few, name) == getattr(all_resident, name)).all()
    assert few.kind[:12].reshape(3, 4).tolist() == [[2, 2, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    assert few.sequence[:12].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (few.kind[12:] == 1).all()


def test_recorded_experts_are_those_of_the_routers(model):
    """For the prompt, the ids equal the top of the routers' logits, computed independently."""
    with attach(model, slots=2) as handle, handle.record() as recorder, torch.no_grad():
        logits = model(PROMPT, output_router_logits=True).router_logits
    experts = torch.from_numpy(recorder.trace().experts).long()
    for layer, of_layer in enumerate(logits):
        expected = of_layer.topk(tiny.TOP_K).indices.sort().values
        assert torch.equal(experts[:, layer].sort().values, expected)


def test_detach_restores_weights_bit_for_bit_and_the_implementation(model):
    """Parameter objects too, so that an optimiser or a tie still holds them."""
    model.set_experts_implementation("batched_mm")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    handle = attach(model, slots=1)
    assert model.config._experts_implementation == "melinoe"
    generate(model, "greedy")
    handle.detach()
    handle.detach()
    assert model.config._experts_implementation == "batched_mm"
    model.set_experts_implementation("grouped_mm")
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(AttachError, match="detached"):
        handle.prefetch([[], []])


def test_unused_slots_never_leak(model):
    """NaN in every slot that nothing was loaded into, and in those given up, changes nothing."""
    expected = generate(model, "greedy")
    with attach(model, slots=6) as handle:
        for cache in handle._caches:
            for tensor in cache.slots.values():
                tensor.fill_(float("nan"))
        assert torch.equal(generate(model, "greedy"), expected)
        handle.reset_cache()
        for cache in handle._caches:
            for tensor in cache.slots.values():
                tensor.fill_(float("nan"))
        assert torch.equal(generate(model, "batch with padding").isnan().any(), torch.tensor(False))
        assert torch.equal(generate(model, "greedy"), expected)


def test_a_streamer_sees_each_token(model):
    """Put is called once with the prompt and once per token."""

    class Counting(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.extend(value.reshape(-1).tolist())

        def end(self):
            pass

    streamer = Counting()
    with attach(model, slots=2):
        tokens = model.generate(PROMPT, **GREEDY, streamer=streamer)
    assert streamer.seen == tokens[0].tolist()


def test_a_pass_that_fails_is_not_counted(model):
    """An exception between two layers leaves no open pass behind."""
    with attach(model, slots=2) as handle:
        with handle.record() as recorder:
            broken = model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError), torch.no_grad():
                model(PROMPT)
            broken.remove()
            generate(model, "greedy")
        assert handle.counters.forwards.tolist() == [1, 7]
        assert recorder.trace().num_forwards == 8


def test_a_handle_says_which_link_it_has(model):
    """A record that names the link asks for it here."""
    link = EmulatedLink(1e9, 1e-6)
    with attach(model, slots=2, link=link) as handle:
        assert handle.link is link
    with attach(model, slots=2) as handle:
        assert handle.link is None


def test_layers_of_other_sizes_are_recorded_each_by_its_own(model):
    """Id 4 is an expert of the first layer of eight and "no expert" of the second, of four."""
    odd = tiny.tiny_model("olmoe")
    second = find_experts(odd)[1].module
    for name, stacked in list(second.named_parameters(recurse=False)):
        setattr(second, name, torch.nn.Parameter(stacked[:4].detach().clone()))
    second.num_experts = 4
    gate = odd.model.layers[1].mlp.gate
    gate.weight = torch.nn.Parameter(gate.weight[:4].detach().clone())
    first = find_experts(odd)[0].module
    index, weights = torch.tensor([[4, 3]]), torch.rand(1, 2)
    with attach(odd, slots=2) as handle, torch.no_grad():
        with handle.record() as recorder:
            first(torch.randn(1, 32), index, weights)
            second(torch.randn(1, 32), index, weights)
        trace, counters = recorder.trace(), handle.counters
    assert trace.experts.tolist() == [[[4, 3], [-1, 3]]]
    assert simulate(trace, 2).counters == counters


def test_recording_a_model_whose_router_is_not_found_says_so():
    """It runs and is counted; only a trace could not be told from another model's."""
    odd = tiny.tiny_model("olmoe")
    block = odd.model.layers[0].mlp
    gate = block.gate
    del block.gate
    vars(block)["gate"] = lambda hidden_states: gate(hidden_states)  # no module, so no router
    with attach(odd, slots=2) as handle:
        generate(odd, "greedy")
        assert handle.counters.tokens.sum() > 0
        recording = handle.record()
        with pytest.raises(UnsupportedModelError, match=r"cannot be recorded.*counters"):
            recording.__enter__()


# --- what is refused --------------------------------------------------------------------------


def test_gradients_are_refused(model):
    """Offloaded experts cannot be trained, and a forward pass with gradients says so."""
    with attach(model, slots=2), pytest.raises(AttachError, match=r"torch\.no_grad"):
        model(PROMPT)


def test_saving_and_casting_are_refused_while_attached(model, tmp_path):
    """A checkpoint without experts, or experts of another type, would go unnoticed."""
    with attach(model, slots=2):
        with pytest.raises(AttachError, match=r"detach\(\)"):
            model.save_pretrained(tmp_path)
        model.to(torch.bfloat16)
        with pytest.raises(AttachError, match="moved or cast"):
            generate(model, "greedy")
        model.to(torch.float32)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_attaching_twice_is_refused(model):
    """The second would find no weights."""
    with attach(model, slots=2), pytest.raises(AttachError, match="attached"):
        attach(model, slots=2)


def test_an_unattached_model_that_asks_for_melinoe_is_refused(model):
    """Choosing the implementation by name alone is an error, not a fallback."""
    with attach(model, slots=2):
        pass
    model.set_experts_implementation("melinoe")
    try:
        with pytest.raises(AttachError, match="no runtime is attached"), torch.no_grad():
            model(PROMPT)
    finally:
        model.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"slots": 2, "expert_memory": "1GiB"}, BudgetError, "not both"),
        ({"slots": 0}, BudgetError, "between 1 and 8"),
        ({"slots": 9}, BudgetError, "between 1 and 8"),
        ({"expert_memory": 100}, BudgetError, "at least 24576 bytes"),
        ({"slots": 2, "policy": "belady"}, MelinoeError, "simulator"),
        ({"slots": 2, "store": "tape"}, AttachError, "no store 'tape'"),
        ({"slots": 2, "store": "disk"}, AttachError, r"melinoe\.load"),
        ({"slots": 2, "engine": "quick"}, AttachError, "no engine 'quick'"),
    ],
)
def test_bad_settings_are_refused_before_anything_moves(model, arguments, error, message):
    """The model works as before."""
    expected = generate(model, "greedy")
    with pytest.raises(error, match=message):
        attach(model, **arguments)
    assert torch.equal(generate(model, "greedy"), expected)


def test_pinned_memory_without_cuda_is_refused(model, monkeypatch):
    """No silent fallback to pageable memory; the weights stay where they are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AttachError, match="CUDA"):
        attach(model, slots=2, store="pinned")
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == tiny.NUM_EXPERTS


def test_a_budget_in_bytes_is_kept(model):
    """An expert takes 12 KiB; five of them in two layers are two slots per layer."""
    block = 4 * block_floats(model)
    with attach(model, expert_memory=2 * block * 2 + block) as handle:
        assert handle.slots == 2
        assert handle.expert_memory_bytes == 4 * block
