"""The device engine on CUDA: bits, no wait for the host, batches, and memory that is kept to."""

import gc

import pytest
import torch
from fast_attach import attach as attach_fast
from library_bits import LibraryBits
from on_cuda import EXPERTS, LAYERS, PROMPT, TOP_K, generate, model
from transformers import ContinuousBatchingConfig, GenerationConfig

import melinoe
from melinoe.cache.simulator import simulate
from melinoe.engine.budget import backbone_bytes, share_budget
from melinoe.engine.passes import Batch
from melinoe.moe.experts import find_experts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("slots", [TOP_K, 6, 8, EXPERTS])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_logits_equal_all_resident_through_the_same_kernels(slots, policy):
    """Bit for bit over 64 steps, dynamic cache: the same engine with every expert in a slot."""
    options = {"return_dict_in_generate": True, "output_logits": True,
               "cache_implementation": "dynamic"}  # fmt: skip
    network = model()
    with melinoe.attach(network, engine="fast", slots=EXPERTS) as handle:
        expected = generate(network, 64, **options)
    with melinoe.attach(network, engine="fast", slots=slots, policy=policy) as handle:
        with handle.record() as recorder:
            found = generate(network, 64, **options)
        counters, prefill = handle.counters, handle.prefill
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(one, other)
    assert simulate(recorder.trace(), slots, policy, prefill=prefill).counters == counters


@pytest.mark.parametrize("slots", [TOP_K, 6, 8])
def test_a_layer_gives_the_librarys_bits_on_as_many_experts(slots, record_property):
    """
    Whatever the library's kernel makes of fewer groups, the engine adds nothing to it.

    Where it does give other bits for fewer groups, that is recorded, and then, and only then, the
    test above may fail.
    """
    network = model()
    library = LibraryBits(network)
    with melinoe.attach(network, engine="fast", slots=slots, graphs=False) as handle:
        handle.prefetch([range(slots)] * LAYERS)
        library.watch(handle)
        generate(network, 32, cache_implementation="dynamic")
    assert library.compared == 31 * LAYERS
    assert library.engine == library.compared
    record_property("share of layers with the bits of all groups", library.fewer / library.compared)


def test_logits_are_those_of_transformers_up_to_rounding():
    """A prompt and a step, dynamic cache; the plain model holds all experts and knows no slots."""
    network, ids = model(), PROMPT.to("cuda")

    def logits():
        with torch.no_grad():
            first = network(ids, use_cache=True)
            then = network(ids[:, :1], past_key_values=first.past_key_values)
        return torch.cat([first.logits, then.logits], dim=1).float()

    expected = logits()
    for slots in (TOP_K, EXPERTS):
        with melinoe.attach(network, engine="fast", slots=slots):
            found = logits()
        assert (found - expected).norm() <= 0.02 * expected.norm(), slots


@pytest.mark.parametrize("length", [127, 128, 129, 520, 2050])
def test_long_prompts_give_the_bits_of_all_resident(length):
    """Groups of 128 rows and more are multiplied by other tiles."""
    network = model(max_position_embeddings=4096)
    ids = (torch.arange(length, device="cuda") % 500 + 1)[None]
    found = []
    for slots in (EXPERTS, TOP_K, 8):
        with melinoe.attach(network, engine="fast", slots=slots), torch.no_grad():
            found.append(network(ids, logits_to_keep=1).logits)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_a_step_never_waits_for_the_host():
    """PyTorch raises at any call that would."""
    network = model()
    with melinoe.attach(network, engine="fast", slots=TOP_K, graphs=False) as handle:
        from transformers import StaticCache

        cache = StaticCache(config=network.config, max_cache_len=64)
        ids = PROMPT.to("cuda")
        position = torch.tensor([[24]], device="cuda")
        mask = torch.ones(1, 1, 1, 64, dtype=torch.bool, device="cuda")
        with torch.no_grad():
            network(ids, past_key_values=cache)
            handle._passes.given = Batch(1, 1, 1, 0, None)
            options = {"past_key_values": cache, "position_ids": position, "attention_mask": mask}
            network(ids[:, :1], **options)
            torch.cuda.set_sync_debug_mode("error")
            try:
                network(ids[:, :1], **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                handle._passes.given = None
        assert handle.counters.tokens.sum() == 26


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4", "fp8"])
def test_codes_serve_the_same_at_any_slots(format):
    """From slots that hold blocks, captured or not, as with every expert resident."""
    network, found = model(), []
    for slots, graphs in ((6, True), (6, False), (EXPERTS, True)):
        options = {"engine": "fast", "slots": slots, "format": format, "graphs": graphs}
        with melinoe.attach(network, **options) as handle:
            found.append(generate(network))
            assert handle.graphs.reason is None
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_continuous_batching_gives_the_tokens_of_single_prompts():
    """With its own CUDA graphs where it has them."""
    network = model()
    prompts = [list(range(3 + n, 20 + 2 * n)) for n in range(5)]
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [generate_one(network, prompt, config) for prompt in prompts]
    for slots in (8, EXPERTS):
        with melinoe.attach(network, engine="fast", slots=slots) as handle:
            outputs = network.generate_batch(
                prompts, generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(
                    num_blocks=16, max_batch_tokens=256, max_requests_per_batch=slots // TOP_K,
                    q_padding_interval_size=1, use_cuda_graph=(slots == EXPERTS, True),
                ),
            )  # fmt: skip
            found = [one.generated_tokens for one in outputs.values()]
            assert handle.fallbacks == 0
        same = [a == b for a, b in zip(found, expected, strict=True)]
        assert sum(same) >= 3  # another attention kernel may round a tie otherwise


def generate_one(network, prompt, config):
    with torch.no_grad():
        ids = torch.tensor([prompt], device="cuda")
        return network.generate(ids, generation_config=config)[0, len(prompt) :].tolist()


def test_a_budget_of_gpu_memory_is_kept(tmp_path):
    """The allocator's peak stays below it; a prompt that is too long fails, the next one works."""
    model(max_position_embeddings=4096).save_pretrained(tmp_path)
    gc.collect()  # what other tests left would count
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    network, handle = melinoe.load(
        tmp_path, "cuda", engine="fast", gpu_memory="400MiB", batch=2, context=512
    )
    try:
        generate(network, 400, batch=2)
        assert torch.cuda.max_memory_allocated() - before <= 400 * 2**20
        with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
            network(torch.ones(64, 4096, dtype=torch.long, device="cuda"))
        assert generate(network, 16).shape == (1, 40)
    finally:
        handle.detach()
    # The cap is gone with the handle: this is more than the budget.
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def test_what_a_budget_counts_is_what_is_allocated():
    """Slots and staging by the allocator's own count."""
    network = model()
    gc.collect()
    layers = find_experts(network)
    plan = share_budget(
        "2GiB", layers, backbone_bytes(network, layers), 64 << 20, 64 << 20,
        batch=1, context=256, staging_experts=2,
    )  # fmt: skip
    assert plan.slots_per_layer == EXPERTS
    full = torch.cuda.memory_allocated()
    with attach_fast(network, slots=6, staging_experts=2) as handle:
        counted = handle.expert_memory_bytes + handle.engine.staging.nbytes
        experts = handle.store.block_bytes(0) * EXPERTS * LAYERS
        used = torch.cuda.memory_allocated() - (full - experts)
        assert counted <= used <= counted + 2**21
