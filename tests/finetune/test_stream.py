"""Training with the experts in a store: the resident model's gradients, and two reads a step."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_training_families import FAMILIES, HEADLESS, with_head

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import Trace
from melinoe.errors import CheckpointError
from melinoe.experts.formats import FORMATS
from melinoe.finetune.parts import LowRankUpdates
from melinoe.finetune.stream import ExpertStream, Reads
from melinoe.moe.experts import find_experts
from melinoe.moe.grouped import grouped_experts
from melinoe.moe.routing import RoutingRecorder, find_routers
from melinoe.stores.ram_store import RamStore
from melinoe.stores.store import read_weights


def updated(model, layers, compute=grouped_experts):
    """Low-rank updates that change something: B is not zero."""
    updates = LowRankUpdates(model, layers, 3, 16.0, 0, compute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in updates.parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return updates


def gradients(model, stream=None, checkpointing=False, seed=0):
    """Gradients of all that can be trained, by name, and the loss, of one pass."""
    model.train()
    if checkpointing:
        options = {"use_reentrant": False}
        if stream is not None:
            options["context_fn"] = stream.checkpoint_contexts
        model.gradient_checkpointing_enable(options)
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (3, 12), generator=generator)
    torch.manual_seed(0)
    logits = model(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    )
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, loss.detach()


def pair(family, dtype=torch.float32, **options):
    """The same model twice: with its experts, and with them in a store."""
    model = tiny.tiny_model(family).to(dtype)
    if family in HEADLESS:
        with_head(model)
    other = copy.deepcopy(model)
    if family in HEADLESS:
        del other.__dict__["forward"]
        with_head(other)
    layers = find_experts(model)
    for layer in layers:
        layer.module.requires_grad_(False)
    updated(model, layers)
    theirs = find_experts(other)
    stream = ExpertStream(RamStore.from_modules(theirs), theirs, **options)
    for layer in theirs:
        layer.module.requires_grad_(False)
    updated(other, theirs, stream.compute)
    return model, other, stream


def assert_equal(ours, theirs):
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys() and any("lora_A" in name for name in ours[0])
    for name, gradient in theirs[0].items():
        assert torch.equal(ours[0][name], gradient), name


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_resident_ones_to_the_bit(family):
    """Of routers, updates, embeddings, with and without checkpointing; in three any chunk."""
    every = family in ("olmoe", "gpt_oss", "nemotron_h")  # gated, with biases, without a gate
    for chunk in (1, 5, tiny.NUM_EXPERTS) if every else (5,):
        model, other, stream = pair(family, chunk=chunk, buffers=2)
        assert_equal(gradients(other, stream), gradients(model))
        if model.supports_gradient_checkpointing:
            assert_equal(gradients(other, stream, True, seed=1), gradients(model, seed=1))
        stream.close()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_gradients_equal_in_half_precision_and_with_widened_experts(family, dtype):
    """Experts of 16 bits under float32 hidden states are cast up as they are read."""
    for widened in (False, True):
        model, other, stream = pair(family, dtype, chunk=3)
        if widened:
            for one in (model, other):
                for name, parameter in one.named_parameters():
                    if "lora" not in name and not name.endswith(_STACKS):
                        parameter.data = parameter.data.float()
        assert_equal(gradients(other, stream), gradients(model))


_STACKS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def chosen(model):
    """A list that each forward pass of a layer adds its experts to, and the hooks that do it."""
    found = []

    def note(module, args, kwargs):
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        found.append(index.unique().tolist())

    for layer in find_routers(model):
        layer.experts.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_used_expert_is_read_twice_a_step(checkpointing):
    """Once in each direction, also where layers are recomputed; measuring is a third."""
    _, model, stream = pair("olmoe", buffers=3)
    used = chosen(model)
    gradients(model, stream, checkpointing)
    layers = len(stream.layers)
    due = sum(map(len, used[:layers]))  # recomputed passes ask again
    assert (stream.reads.forward, stream.reads.backward, stream.reads.unused) == (due, due, 0)
    assert stream.reads.bytes == 2 * due * stream.store.block_bytes(0)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 20)[None])
    assert stream.reads.forward == due + sum(map(len, used[-layers:]))
    assert stream.reads.backward == due


@pytest.mark.filterwarnings("default")
def test_reads_equal_the_simulators_requests_of_the_recorded_routing():
    """A simulated cache asks for each used expert once a layer and pass."""
    _, model, stream = pair("olmoe")
    model.train()
    ids = torch.randint(3, tiny.VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    with RoutingRecorder(find_routers(model)) as recorder:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
        index = torch.stack([one.top_k_index for one in recorder.take()], dim=1)
    trace = Trace(
        experts=index.numpy().astype(np.int16),
        forward=np.zeros(24, np.int32),
        sequence=np.zeros(24, np.int32),
        kind=np.zeros(24, np.uint8),
        num_experts=tiny.NUM_EXPERTS,
    )
    loads = simulate(trace, tiny.NUM_EXPERTS).counters.loads.sum()
    assert (stream.reads.forward, stream.reads.backward) == (loads, loads)


@pytest.mark.filterwarnings("default")
def test_a_second_step_reads_ahead_what_the_first_used():
    """The same tokens again: what was guessed is what is used, and nothing is read in vain."""
    _, model, stream = pair("olmoe", buffers=4)
    gradients(model, stream)
    first, stream.reads = stream.reads, Reads()
    gradients(model, stream)
    assert stream.reads.forward == first.forward and stream.reads.unused == 0


@pytest.mark.filterwarnings("default")
def test_a_wrong_guess_changes_no_gradient_and_is_counted():
    """Other tokens than the last time choose other experts."""
    resident, model, stream = pair("olmoe", buffers=8)
    gradients(model, stream)
    for used in stream._used.values():
        used[:] = range(tiny.NUM_EXPERTS)
    stream.reads = Reads()
    router = find_routers(model)[1].weight
    other = find_routers(resident)[1].weight
    with torch.no_grad():  # layer 1 uses two experts alone
        for weight in (router, other):
            weight.zero_()
            weight[:2] = 1.0
    assert_equal(gradients(model, stream), gradients(resident))
    assert stream.reads.unused > 0


@pytest.mark.filterwarnings("default")
def test_a_read_that_fails_ends_the_step_and_the_next_one_is_whole(monkeypatch):
    """The disk's error is the step's; afterwards every buffer is free again."""
    resident, model, stream = pair("olmoe", buffers=2)
    real, calls = stream.store.read, []

    def read(layer, expert, into):
        calls.append(expert)
        if len(calls) == 9:
            raise CheckpointError("the disk fails")
        real(layer, expert, into)

    monkeypatch.setattr(stream.store, "read", read)
    with pytest.raises(CheckpointError, match="the disk fails"):
        gradients(model, stream)
    assert_equal(gradients(model, stream), gradients(resident))


@pytest.mark.filterwarnings("default")
def test_packed_experts_give_the_gradients_of_what_they_mean():
    """int8 blocks are unpacked as they are read: as a resident model with the decoded weights."""
    model = tiny.tiny_model("olmoe")
    layers = [replace(one, format=FORMATS["int8"]) for one in find_experts(model)]
    other = copy.deepcopy(model)
    theirs = [replace(one, module=other.get_submodule(one.name)) for one in layers]
    store = RamStore.from_modules(theirs)
    for layer in layers:
        for expert in range(layer.num_experts):
            for name, weights in read_weights(layer, store, expert).items():
                layer.module.get_parameter(name).data[expert] = weights
        layer.module.requires_grad_(False)
    stream = ExpertStream(store, theirs)
    for one, these, compute in ((model, layers, grouped_experts), (other, theirs, stream.compute)):
        updated(one, these, compute)
    for layer in theirs:
        layer.module.requires_grad_(False)
        layer.module.low_rank.requires_grad_(True)
    for layer in layers:
        layer.module.low_rank.requires_grad_(True)
    assert_equal(gradients(other, stream), gradients(model))
    assert stream.reads.bytes == 2 * stream.reads.forward * store.block_bytes(0)
