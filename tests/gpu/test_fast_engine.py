"""The fast engine on CUDA: kernels compiled, steps captured, and no wait for the host."""

import gc
from contextlib import nullcontext

import numpy as np
import pytest
import tiny
import torch
from library_bits import LibraryBits
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM

import melinoe
from melinoe.cache.packing import pack
from melinoe.cache.policy import policy as make_policy
from melinoe.cache.residency import Residency
from melinoe.cache.simulator import simulate
from melinoe.fast.batching import batching_config
from melinoe.fast.blocks import addresses, segments
from melinoe.fast.budget import backbone_bytes, plan_budget
from melinoe.fast.compressed import CompressedStore
from melinoe.fast.copying import CopyPlan
from melinoe.fast.expanding import ExpandPlan
from melinoe.fast.residency import DeviceResidency
from melinoe.moe.experts import find_experts
from melinoe.runtime.calls import Batch
from melinoe.runtime.ram_store import PinnedStore

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
EXPERTS, TOP_K, LAYERS = 16, 4, 3


def model(seed=0, **options):
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        initializer_range=0.1,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    found = OlmoeForCausalLM(config).to("cuda", torch.bfloat16).eval()
    found.set_experts_implementation("grouped_mm")
    # On a GPU generate would decode with batched_mm, another kernel, which rounds otherwise.
    vars(found)["_optimize_model_for_decode"] = nullcontext
    return found


PROMPT = torch.arange(1, 25).reshape(1, -1)


def generate(network, tokens=48, batch=1, **options):
    ids = PROMPT.repeat(batch, 1).to("cuda") + torch.arange(batch, device="cuda")[:, None]
    with torch.no_grad():
        return network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            **options,
        )


def test_kernels_are_compiled():
    """The suite would prove nothing of the GPU through the interpreter."""
    import triton

    assert not triton.knobs.runtime.interpret


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(("experts", "capacity"), [(8, 4), (64, 16), (128, 64), (512, 100)])
def test_the_device_plans_what_the_host_plans(policy, experts, capacity):
    """Compiled, one to four warps: loads, order, slots, state, 200 requests each."""
    rng = np.random.default_rng(experts)
    host = Residency(experts, capacity, policy)
    device = DeviceResidency([experts], [capacity], [lambda: make_policy(policy)], CUDA)
    for _ in range(200):
        few = rng.permutation(experts)[: rng.integers(1, min(capacity, 40) + 1)]
        index = rng.choice(np.append(few, [experts, -1]), size=(rng.integers(1, 5), 8))
        known = np.unique(index[(index >= 0) & (index < experts)])
        plan = host.request(known.tolist())
        weights = torch.rand(index.shape, device=CUDA)
        slots, kept = device.decide(0, torch.from_numpy(index).to(CUDA), weights)
        count = int(device.num_loads[0])
        loads = list(zip(device.load_expert[0, :count].tolist(),
                         device.load_slot[0, :count].tolist(), strict=True))  # fmt: skip
        assert loads == [(load.expert, load.slot) for load in plan.loads]
        assert np.array_equal(device.state[0].cpu().numpy(), pack(host))
        real = torch.from_numpy((index >= 0) & (index < experts))
        assert np.array_equal(slots.cpu()[real].numpy(), host.slot_of[index[real.numpy()]])
        assert torch.equal(kept.cpu(), torch.where(real, weights.cpu(), 0.0))


@pytest.mark.parametrize("compression", [None, "int8", "int4"])
def test_experts_arrive_from_pinned_memory_bit_for_bit(compression):
    """Exact bytes or expanded codes, with slots not listed and guard zones untouched."""
    layers = find_experts(model())
    if compression is None:
        store = PinnedStore(layers)
    else:
        store = CompressedStore(layers, compression, pinned=True)
    for expert in range(EXPERTS):
        one = {t.name: torch.randn(t.shape).to(t.dtype) for t in layers[0].tensors}
        store.write(0, expert, one)
    guard, count = 4096, 6
    around = {
        t.name: torch.full((count * t.nbytes // 2 + 2 * guard,), -7.0, dtype=t.dtype, device=CUDA)
        for t in layers[0].tensors
    }
    slots = {t.name: around[t.name][guard:-guard].view(count, *t.shape) for t in layers[0].tensors}
    expected = {name: flat.cpu().clone() for name, flat in around.items()}
    where = addresses(store, 0, CUDA)
    plan = (
        CopyPlan(where, segments(store, 0), slots)
        if compression is None
        else ExpandPlan(where, store.sections(0), store.bits, slots)
    )
    pairs = [(5, 2), (11, 0), (0, 5)]
    lists = torch.tensor(pairs, dtype=torch.int32, device=CUDA).T.contiguous()
    plan.launch(lists[0], lists[1], torch.tensor([3], dtype=torch.int32, device=CUDA))
    for expert, slot in pairs:
        store.read(0, expert, {
            t.name: expected[t.name][guard:-guard].view(count, *t.shape)[slot]
            for t in layers[0].tensors
        })  # fmt: skip
    for name, flat in around.items():
        assert torch.equal(flat.cpu(), expected[name]), name


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


@pytest.mark.parametrize("batch", [1, 2, 4])
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


def test_a_capture_that_fails_is_named_and_the_text_goes_on():
    """A hook asks the device what it holds, which no capture can."""
    network = model()
    with melinoe.attach(network, engine="fast", slots=8, graphs=False):
        expected = generate(network, cache_implementation="static")
    network.lm_head.register_forward_hook(lambda _, __, output: output.sum().item() and None)
    with melinoe.attach(network, engine="fast", slots=8) as handle:
        for _ in range(2):
            assert torch.equal(generate(network), expected)
        assert "captur" in handle.graphs.reason and handle.graphs.replayed == 0


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


def test_compiled_steps_give_bits_that_do_not_depend_on_the_slots():
    """Compiled, captured and replayed: few slots, some, all; nearly the model's own."""
    network = model()
    found = []
    for slots, compile in ((EXPERTS, False), (EXPERTS, True), (8, True), (TOP_K, True)):
        with melinoe.attach(network, engine="fast", slots=slots, compile=compile) as handle:
            found.append(generate(network, return_dict_in_generate=True, output_logits=True))
            assert handle.graphs.reason is None and handle.graphs.captured == 1
            assert not compile or handle.graphs.compiled.reason is None
            assert handle.counters.loads[1].sum() > 0 or slots == EXPERTS
    own, resident, *fewer = found
    for one in fewer:
        for logits, expected in zip(one.logits, resident.logits, strict=True):
            assert torch.equal(logits, expected)
    # The first logits are the prompt's, the next a step's as it is, the third the compiled step's.
    if torch.equal(own.sequences[:, :26], resident.sequences[:, :26]):
        expected = own.logits[2].float()
        assert (resident.logits[2].float() - expected).norm() < 0.02 * expected.norm()


def test_compiled_batches_are_replayed():
    """Four sequences, twice; the second time nothing is compiled."""
    network = model()
    with melinoe.attach(network, engine="fast", slots=EXPERTS, compile=True) as handle:
        first = generate(network, batch=4)
        took = handle.graphs.compiled.compile_s
        assert torch.equal(generate(network, batch=4), first)
        assert handle.graphs.compiled.compile_s == took > 0
        assert handle.graphs.captured == 1 and handle.graphs.compiled.reason is None


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
                latest = handle.latest_counters
            finally:
                torch.cuda.set_sync_debug_mode("default")
                handle._passes.given = None
        torch.cuda.synchronize()
        assert handle.latest_counters.num_layers == latest.num_layers
        assert latest.num_layers == LAYERS
        assert handle.latest_counters.tokens.sum() <= handle.counters.tokens.sum() == 26


@pytest.mark.parametrize("compression", ["int8", "int4"])
def test_codes_serve_what_they_stand_for(compression):
    """The all-resident engine on the decoded weights gives the same tokens."""
    network = model()
    with melinoe.attach(network, engine="fast", slots=6, compression=compression):
        found = generate(network)
    with melinoe.attach(network, engine="fast", slots=EXPERTS):
        assert torch.equal(generate(network), found)


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
                continuous_batching_config=batching_config(
                    handle, TOP_K, num_blocks=16, max_batch_tokens=256
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
    plan = plan_budget(
        "2GiB", layers, backbone_bytes(network, layers), 64 << 20, 64 << 20,
        batch=1, context=256, staging_experts=2,
    )  # fmt: skip
    assert plan.slots_per_layer == EXPERTS
    full = torch.cuda.memory_allocated()
    with melinoe.attach(network, engine="fast", slots=6, staging_experts=2) as handle:
        counted = handle.expert_memory_bytes + handle.staging_bytes
        experts = handle.store.block_bytes(0) * EXPERTS * LAYERS
        used = torch.cuda.memory_allocated() - (full - experts)
        assert counted <= used <= counted + 2**21
