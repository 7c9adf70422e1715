"""What a failure half-way leaves behind: right results, right counts, the model's own weights."""

import weakref
from copy import deepcopy

import pytest
import tiny
import torch

from melinoe import attach
from melinoe.cache.simulator import simulate
from melinoe.engine.reference import ReferenceEngine
from melinoe.errors import AttachError, CheckpointError
from melinoe.moe.experts import find_experts
from melinoe.stores.ram_store import RamStore

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])


def failing(monkeypatch, times):
    """Let the *times*-th read of a store write garbage and fail."""
    real, reads = RamStore.read, []

    def read(self, layer, expert, into):
        reads.append(expert)
        if len(reads) == times:
            for slot in into.values():
                slot.fill_(float("nan"))
            raise CheckpointError("the shard is torn")
        real(self, layer, expert, into)

    monkeypatch.setattr(RamStore, "read", read)


@pytest.mark.parametrize("slots", [2, 8])
def test_an_expert_that_could_not_be_read_is_not_resident(model, monkeypatch, slots):
    """The read fails half-way; the next pass reads that expert again and is right."""
    with torch.no_grad():
        expected = model(PROMPT).logits
        with attach(model, slots=slots) as handle:
            failing(monkeypatch, 2)
            with pytest.raises(CheckpointError):
                model(PROMPT)
            assert handle.resident()[0] == []
            handle.audit()
            assert torch.equal(model(PROMPT).logits, expected)
            assert handle.audit() > 0


def test_an_expert_that_could_not_be_prefetched_is_not_resident(model, monkeypatch):
    """The same ahead of need: nothing of that layer is trusted afterwards."""
    with torch.no_grad():
        expected = model(PROMPT).logits
        with attach(model, slots=8) as handle:
            failing(monkeypatch, 3)
            with pytest.raises(CheckpointError):
                handle.prefetch([[0, 1, 2, 3], [0]])
            assert handle.resident() == [[], []]
            assert torch.equal(model(PROMPT).logits, expected)
            assert handle.audit() > 0


def test_a_prefetch_with_a_wrong_id_loads_nothing(model):
    """Expert 9 of 8 in the second layer: the first layer is left alone too."""
    with attach(model, slots=8) as handle:
        with pytest.raises(ValueError, match="outside 0 to 7"):
            handle.prefetch([[0, 1], [9]])
        assert handle.resident() == [[], []]


def test_a_recording_that_an_exception_ends_drops_the_open_pass(model):
    """The pass that failed between two layers is neither counted nor in the trace."""
    with attach(model, slots=2) as handle, torch.no_grad():
        broken = model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), handle.record() as recorder:
            model(PROMPT)
        broken.remove()
        assert handle.counters.forwards.tolist() == [0, 0]
        assert recorder._passes == []
        assert handle.audit() > 0


def test_a_copy_into_the_store_that_stops_half_way_keeps_the_weights(model, monkeypatch):
    """Interrupted before the second layer was copied: both layers have their own numbers."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    import melinoe.stores.ram_store as module

    real, calls = module.weights_of, []

    def stacked(layer):
        calls.append(layer)
        if len(calls) == 4:  # two to look for shared weights, one for the first layer
            raise KeyboardInterrupt
        return real(layer)

    monkeypatch.setattr(module, "weights_of", stacked)
    with pytest.raises(KeyboardInterrupt):
        attach(model, slots=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("given", [False, True])
def test_packing_that_fails_at_the_end_leaves_the_weights_unrounded(model, monkeypatch, given):
    """The engine cannot be plugged in: every number is the model's own, not what blocks mean."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    packed = {"format": "int4"}
    if given:
        packed = {"store": attach(deepcopy(model), slots=2, format="int4").store}
    monkeypatch.setattr(ReferenceEngine, "plug_in", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(model, slots=2, **packed)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_detached_handle_holds_no_slot(model):
    """Their memory is free though the handle, its counters and books are kept."""
    with torch.no_grad():
        handle = attach(model, slots=2)
        model(PROMPT)
        slots = [weakref.ref(slot) for cache in handle._caches for slot in cache.slots.values()]
        counted, resident = handle.counters, handle.resident()
        handle.detach()
        assert [ref() for ref in slots] == [None] * len(slots)
        assert (handle.counters, handle.resident()) == (counted, resident)
        assert handle.expert_memory_bytes > 0


def test_a_detach_that_fails_can_be_repeated(model, monkeypatch):
    """No memory for the second layer's weights: still attached, still right; then it works."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(PROMPT).logits
        handle = attach(model, slots=2)
        with monkeypatch.context() as patch:
            failing(patch, tiny.NUM_EXPERTS + 2)
            with pytest.raises(CheckpointError):
                handle.detach()
        assert torch.equal(model(PROMPT).logits, expected)
        handle.audit()
        handle.detach()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_store_of_another_model_is_refused(model):
    """Half the experts, or experts twice as large, would be computed with."""
    other = tiny.tiny_model("olmoe", intermediate_size=64)
    with pytest.raises(AttachError, match="other experts"):
        attach(model, slots=2, store=RamStore(find_experts(other)))
    assert model(PROMPT).logits.requires_grad  # not attached


def test_a_prompt_in_pieces_that_begin_with_padding_counts_as_simulated(model):
    """Four tokens of padding alone, then the rest, then one token: 8 of the prompt, 1 after it."""
    ids = torch.tensor([[0, 0, 0, 0, 5, 6, 7, 8, 9]])
    mask = (ids != 0).long()
    with attach(model, slots=3, policy="lfu") as handle, torch.no_grad():
        with handle.record() as recorder:
            past = None
            for begin, end in ((0, 4), (4, 8), (8, 9)):
                past = model(
                    ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=past
                ).past_key_values
        counted, trace = handle.counters, recorder.trace()
    assert trace.kind.tolist() == [2] * 4 + [0] * 4 + [1]
    assert counted.tokens.tolist() == [8, 1]
    assert simulate(trace, 3, "lfu").counters == counted


def test_a_store_with_other_contents_is_refused(model):
    """Of the right size and empty, or of another seed: the model's own weights would be lost."""
    other = tiny.tiny_model("olmoe", seed=1)
    empty = RamStore(find_experts(model))
    for layer, one in enumerate(find_experts(model)):
        for expert in range(one.num_experts):
            for tensor in empty.views(layer, expert).values():
                tensor.zero_()  # not whatever the memory held: an earlier store of this very model
    for store in (empty, RamStore.from_modules(find_experts(other))):
        with pytest.raises(AttachError, match="other experts"):
            attach(model, slots=2, store=store)
    with torch.no_grad():
        expected = model(PROMPT).logits
        with attach(model, slots=2) as handle:
            own = handle.store
        with attach(model, slots=2, store=own):
            assert torch.equal(model(PROMPT).logits, expected)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_a_layer_that_is_left_out_of_some_passes_counts_as_simulated(model, policy):
    """Every third pass the second layer sees no token, every third only choices of no expert."""
    first, second = (layer.module for layer in find_experts(model))
    torch.manual_seed(0)
    options = {"gamma": 0.5} if policy == "lfu" else {}
    with attach(model, slots=3, policy=policy, policy_options=options) as handle, torch.no_grad():
        with handle.record() as recorder:
            for number in range(40):
                hidden, weights = torch.randn(1, 32), torch.rand(1, 2)
                index = torch.randperm(8)[None, :2]
                first(hidden, index, weights)
                if number % 3 == 1:
                    nothing = second(hidden[:0], index[:0], weights[:0])
                    assert nothing.shape == (0, 32)
                else:
                    absent = torch.full_like(index, 8)
                    second(hidden, absent if number % 3 else torch.randperm(8)[None, :2], weights)
        counted, trace = handle.counters, recorder.trace()
    assert simulate(trace, 3, policy, policy_options=options).counters == counted
    assert counted.requests.tolist() == [[0, 0], [40, 14]]
