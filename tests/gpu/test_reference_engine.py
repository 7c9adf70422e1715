"""The reference engine on CUDA: the same tokens, counts and bytes as on any machine."""

import pytest
import torch
from on_cuda import EXPERTS, LAYERS, TOP_K, model
from small_olmoe import tiny_model

import melinoe
from melinoe.cache.simulator import simulate
from melinoe.experts.format import PLAIN

pytestmark = pytest.mark.gpu

PROMPT = {"input_ids": torch.arange(1, 25).reshape(1, -1)}


def generate(network, tokens=48, **options):
    inputs = {name: value.to("cuda") for name, value in PROMPT.items()}
    with torch.no_grad():
        return network.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, **options
        ).tolist()


@pytest.mark.parametrize("store", ["pinned", "ram"])
@pytest.mark.parametrize("slots", [1, 3, TOP_K, 8, EXPERTS])
def test_tokens_equal_the_all_resident_models(slots, store):
    """Greedy tokens from few slots are those of the untouched model."""
    network = model()
    expected = generate(network)
    with melinoe.attach(network, engine="reference", slots=slots, store=store):
        assert generate(network) == expected
        assert generate(network) == expected  # from a warm cache too
    assert generate(network) == expected  # and detached


@pytest.mark.parametrize("format", ["int4", "mxfp4", "fp8"])
def test_packed_slots_are_unpacked_where_they_are(format):
    """Logits near those of the weights that the blocks mean, which the model has once detached."""
    network = model()
    ids = PROMPT["input_ids"].to("cuda")
    with torch.no_grad():
        with melinoe.attach(network, engine="reference", slots=3, format=format) as handle:
            found = network(ids).logits.float()
            assert handle.layers[0].block_bytes < handle.layers[0].stored_as(PLAIN).block_bytes
            assert handle.audit() > 0
        expected = network(ids).logits.float()
    assert float((found - expected).norm()) <= 0.03 * float(expected.norm())


def test_prefetches_in_flight_never_show():
    """Random prefetches between tokens, overlapping with demand loads, change no token."""
    network = model()
    expected = generate(network, tokens=32)
    rng = torch.Generator().manual_seed(0)
    with melinoe.attach(network, engine="reference", slots=5, store="pinned") as handle:
        for _ in range(20):
            handle.prefetch(
                [torch.randperm(EXPERTS, generator=rng)[:5].tolist() for _ in range(LAYERS)]
            )
            assert generate(network, tokens=32) == expected


def test_a_stale_slot_would_show():
    """The control of the tests above: slots with another expert's weights change the tokens."""
    network = model()
    expected = generate(network)
    with melinoe.attach(network, engine="reference", slots=EXPERTS, store="pinned") as handle:
        handle.prefetch([list(range(EXPERTS))] * LAYERS)
        for cache in handle._caches:
            for tensor in cache.slots.values():
                tensor.copy_(tensor.roll(1, 0))
        assert generate(network) != expected


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_counts_equal_the_simulators(policy):
    """Counts of a run on the GPU are those that its trace simulates to."""
    network = model()
    with melinoe.attach(
        network, engine="reference", slots=5, store="pinned", policy=policy
    ) as handle:
        with handle.record() as recorder:
            generate(network)
        assert handle.counters == simulate(recorder.trace(), 5, policy).counters


def test_the_pinned_store_is_pinned_and_slots_stay_within_the_budget():
    """Host blocks are page-locked; device memory grows by the slots alone."""
    network = model()
    full = torch.cuda.memory_allocated()
    with melinoe.attach(
        network, engine="reference", expert_memory="2MiB", store="pinned"
    ) as handle:
        assert handle.expert_memory_bytes <= 2 * 2**20
        assert all(block.is_pinned() for block in handle.store._blocks)
        experts = handle.store.block_bytes(0) * EXPERTS * LAYERS
        assert torch.cuda.memory_allocated() <= full - experts + 2 * 2**20 + 2**16


def test_a_checkpoint_loads_straight_to_the_gpu(tmp_path):
    """load(device="cuda") from pinned memory and from disk gives the plain model's tokens."""
    network = model()
    network.save_pretrained(tmp_path)
    expected = generate(network)
    for store in ("pinned", "disk", "auto"):
        loaded, handle = melinoe.load(tmp_path, "cuda", engine="reference", slots=5, store=store)
        assert generate(loaded) == expected, store
        handle.detach()


def test_stalls_are_measured_on_the_device():
    """Loads on demand make the computation wait, and the wait is counted."""
    network = model()
    with melinoe.attach(network, engine="reference", slots=TOP_K, store="pinned") as handle:
        generate(network)
        assert handle.stall_s > 0
        assert handle.transferred_bytes == handle.counters.loads.sum() * handle.store.block_bytes(0)


def test_float32_on_the_gpu_equals_the_cpu():
    """The tiny model of the other tests, one token at a time."""
    on_cpu, on_gpu = tiny_model(), tiny_model().to("cuda")
    ids = torch.arange(3, 12).reshape(1, -1)
    with torch.no_grad(), melinoe.attach(on_gpu, engine="reference", slots=3, store="pinned"):
        expected = on_cpu(input_ids=ids).logits
        assert torch.allclose(on_gpu(input_ids=ids.cuda()).logits.cpu(), expected, atol=1e-4)
