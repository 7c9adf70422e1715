"""Loading by engine, and a budget of GPU memory shared out to the byte."""

import pytest
import tiny
import torch
from small_olmoe import tiny_model
from transformers import StaticCache

import melinoe
import melinoe.engine.device.engine as engine_module
import melinoe.engine.load as load_module
from melinoe import attach
from melinoe.engine.budget import (
    backbone_bytes,
    cap_memory,
    pieces,
    prompt_bytes,
    share_budget,
    staging_bytes,
    watched,
)
from melinoe.engine.device import support
from melinoe.engine.device.copying import Staging
from melinoe.engine.device.static_cache import tensors
from melinoe.engine.device.support import why_not
from melinoe.errors import BudgetError
from melinoe.experts.formats import named_format
from melinoe.moe.experts import find_experts

IDS = torch.tensor([[3, 4, 5, 6]])
MIB = 1 << 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.save_pretrained(path)
    return path, model.generate(IDS, max_new_tokens=6, do_sample=False)


def generated(model):
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("engine", ["reference", "fast", "auto"])
def test_every_engine_loads_the_same_model(saved, engine):
    """Each gives its handle, and the plain model's tokens."""
    path, expected = saved
    model, handle = melinoe.load(path, engine=engine, slots=4)
    assert handle.engine.name == ("fast" if engine == "fast" else "reference")
    assert torch.equal(generated(model), expected)
    handle.detach()
    assert torch.equal(generated(model), expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_checkpoint_is_loaded_into_codes(saved, format):
    """The same codes as when the model's own weights are put into them."""
    path, _ = saved
    model, handle = melinoe.load(path, engine="fast", slots=4, format=format)
    own = tiny_model()
    with torch.no_grad(), melinoe.attach(own, engine="fast", slots=4, format=format):
        assert torch.equal(model(IDS).logits, own(IDS).logits)
    assert handle.store.format(0).name == format


@pytest.mark.parametrize(
    ("found", "cuda", "capability", "interpret", "said"),
    [
        ("3.3.1", True, (9, 0), False, "3.3.1 is too old"),
        ("3.6.0", False, (9, 0), False, "no CUDA device"),
        ("3.6.0", True, (7, 5), False, "7.5"),
        ("3.6.0", True, (9, 0), True, "TRITON_INTERPRET"),
        ("3.6.0", True, (9, 0), False, None),
        ("3.10.0", True, (8, 0), False, None),
    ],
)
def test_why_the_engine_cannot_run_is_said(monkeypatch, found, cuda, capability, interpret, said):
    """Old Triton, no GPU, an old GPU, the interpreter on a GPU."""
    import triton

    monkeypatch.setattr(support, "version", lambda name: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    reason = why_not(torch.device("cuda"))
    assert reason is None if said is None else said in reason
    if not interpret:
        assert "it needs a CUDA device" in why_not(torch.device("cpu")) or found == "3.3.1"


# --- budgets ------------------------------------------------------------------------------------


def olmoe_1b_7b():
    """The shape alone, on the meta device."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        return OlmoeForCausalLM(config).to(torch.bfloat16)


def test_a_budget_is_shared_out_as_worked_by_hand():
    """OLMoE-1B-7B in 8 GiB, batch 1, 2,048 tokens: the parts, and the most slots that fit."""
    model = olmoe_1b_7b()
    layers = find_experts(model)
    backbone = backbone_bytes(model, layers)
    # Embeddings and head 2 x 50304 x 2048, attention 4 x 2048^2, router 64 x 2048, norms; bf16.
    by_hand = 2 * (2 * 50304 * 2048 + 16 * (4 * 2048**2 + 64 * 2048 + 4 * 2048) + 2048)
    assert backbone == pytest.approx(by_hand, rel=1e-3)
    cache, prompt = prompt_bytes(model, layers, 1, 2048)
    options = {"batch": 1, "context": 2048, "staging_experts": 4}
    budget = share_budget("8GiB", layers, backbone, cache, prompt, **options)
    kv = 16 * 2 * 2048 * 2048 * 2  # layers, keys and values, tokens, width
    assert kv <= budget.kv_cache <= kv + 16 * 512  # and each layer's count of tokens
    assert budget.staging == 2 * 4 * 3 * 2048 * 1024 * 2
    assert budget.slots == budget.slots_per_layer * 16 * 3 * 2048 * 1024 * 2
    assert budget.used <= budget.total < budget.used + 16 * 3 * 2048 * 1024 * 2
    assert 30 < budget.slots_per_layer < 36
    assert "slots" in str(budget) and "8GiB" in str(budget)
    # Twice the sequences take slots away, and more memory than all experts need gives all.
    shorter = share_budget("8GiB", layers, backbone, 8 * kv, 8 * prompt, **options | {"batch": 8})
    assert shorter.slots_per_layer < budget.slots_per_layer
    everything = share_budget("80GiB", layers, backbone, cache, prompt, **options)
    assert everything.slots_per_layer == 64


def test_slots_that_hold_packed_experts_take_their_packed_bytes():
    """Int4 with groups of 64 is under a third of bfloat16: all 64 experts fit into the 8 GiB."""
    layers = [one.stored_as(named_format("int4")) for one in find_experts(olmoe_1b_7b())]
    options = {"batch": 1, "context": 2048, "staging_experts": 0}
    budget = share_budget("8GiB", layers, 1 << 30, 1 << 28, 1 << 28, **options)
    assert budget.slots_per_layer == 64
    # Codes of four bits, and a scale and a minimum of 16 bits for each group, in pieces of 2 MiB.
    weights = 16 * 64 * 3 * 2048 * 1024
    assert budget.slots == pytest.approx(weights / 2 + weights / 64 * 4, rel=0.01)


def test_a_budget_below_the_least_names_the_least():
    """And that very amount works, with one slot per layer."""
    model = olmoe_1b_7b()
    layers = find_experts(model)
    options = {"batch": 1, "context": 512, "staging_experts": 1}
    known = (
        backbone_bytes(model, layers),
        *prompt_bytes(model, layers, 1, 512),
    )
    with pytest.raises(BudgetError, match=r"give (\S+) or more") as error:
        share_budget("1GiB", layers, *known, **options)
    least = str(error.value).split("give ")[1].split(" ")[0]
    found = share_budget(least, layers, *known, **options)
    assert found.slots_per_layer == 1


def test_tied_weights_are_counted_once():
    """One memory under two names."""
    model = tiny_model()
    layers = find_experts(model)
    before = backbone_bytes(model, layers)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert before - backbone_bytes(model, layers) == -(-32 * 16 * 4 // 512) * 512


def test_staging_is_what_is_allocated():
    """The blocks' own bytes."""
    layers = find_experts(tiny.tiny_model("gpt_oss"))
    staging = Staging(torch.device("cpu"), 3)
    for layer in layers:
        staging.blocks(layer)
    assert staging.nbytes == staging_bytes(tuple(layers), 3)


NO_STATIC_CACHE = ("deepseek_v4", "minimax")
LOOKS_AT_VALUES = ("glm5_next", "qwen4_exp")
GENERATES = [f for f in tiny.families() if hasattr(tiny._model_class(f), "generate")]


@pytest.mark.parametrize("family", GENERATES)
def test_a_prompts_cache_and_workspace_are_what_its_pass_makes(family):
    """Every family: told from a pass without values; then followed in one with its experts."""
    model = tiny.tiny_model(family)
    hollow = tiny.on_meta(model)
    if family in LOOKS_AT_VALUES:
        with pytest.raises(BudgetError, match="give slots or expert_memory"):
            prompt_bytes(hollow, find_experts(hollow), 2, 120)
        return
    counted, told = prompt_bytes(hollow, find_experts(hollow), 2, 120)
    ids = torch.randint(3, 90, (2, 120), generator=torch.Generator().manual_seed(0))
    options = {"use_cache": True}
    if getattr(model, "_supports_logits_to_keep", bool)():
        options["logits_to_keep"] = 1
    static = family not in NO_STATIC_CACHE
    with attach(model, engine="fast", slots=6) as handle, torch.no_grad():
        known = [ids, *model.parameters(), *model.buffers(), *held_by(handle)]
        if static:
            cache = StaticCache(config=model.config, max_cache_len=120)
            model(ids[:, :2], past_key_values=cache)
            held = [one for layer in cache.layers for one in tensors(layer)]
            cache.reset()
            known += held
            options["past_key_values"] = cache
        with watched(known) as live:
            found = model(ids, **options)
    if static:
        assert counted == sum(pieces(t.nbytes) for t in held) > 0
        assert counted >= sum(t.nbytes for t in held)
    else:  # followed with the pass; some keys are the values too
        told += counted
        kept = found.past_key_values.layers
        held = {t.data_ptr(): t.nbytes for layer in kept for t in tensors(layer)}
        assert sum(held.values()) <= counted + 64 <= 1.5 * sum(held.values())
    assert live.most <= 1.02 * told  # what the engine notes of a pass is of no size
    assert told <= 2.5 * live.most


def held_by(handle):
    """Memory that the engine had before: slots, staging, and the experts in host memory."""
    for one in handle._caches:
        yield from one.slots.values()
    for pair in handle.engine.staging._blocks.values():
        for block in pair:
            yield from block.values()
    for layer in handle.layers:
        for expert in range(layer.num_experts):
            yield from handle.store.views(layer.index, expert).values()


def test_attention_that_keeps_all_probabilities_is_counted():
    """Eager attention makes tokens x tokens numbers a head; fused attention does not."""
    found = {}
    for way in ("eager", "sdpa"):
        model = olmoe_1b_7b()
        model.set_attn_implementation(way)
        layers = find_experts(model)
        found[way] = [prompt_bytes(model, layers, 1, tokens).workspace for tokens in (1024, 2048)]
    eager, fused = found["eager"], found["sdpa"]
    # Scores in bfloat16 and their softmax in float32, of 16 heads, at least.
    assert eager[1] > 16 * 2048**2 * (2 + 4) and eager[1] > fused[1]
    assert fused[1] < 2.2 * fused[0]


def test_the_allocator_is_told_the_budget_and_then_what_was_before(monkeypatch):
    """It is told a share of the device's memory; on the CPU nothing."""
    told = [0.5]

    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: told[-1])
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append(share)
    )
    for device in ("cpu", "cuda"):
        lift = cap_memory(8 << 30, torch.device(device))
        lift()
        lift()
    assert told == [0.5, 0.1, 0.5]


def test_a_budget_is_kept_from_loading_to_detaching(saved, monkeypatch):
    """And lifted where loading fails; what is put back may need more than the budget."""
    told = []

    def cap(total, device):
        told.append(total)
        return lambda: told.append("lifted")

    monkeypatch.setattr(load_module, "cap_memory", cap)
    path, _ = saved
    _, handle = melinoe.load(path, engine="fast", gpu_memory="1GiB", context=32)
    assert told == [1 << 30] and handle.budget.total == 1 << 30
    handle.detach()
    assert told == [1 << 30, "lifted"]

    def failing(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(engine_module, "DeviceEngine", failing)
    with pytest.raises(RuntimeError, match="luck"):
        melinoe.load(path, engine="fast", gpu_memory="1GiB", context=32)
    assert told == [1 << 30, "lifted"] * 2


def test_load_takes_its_slots_from_the_budget(saved):
    """And refuses to be told twice, or half."""
    path, expected = saved
    model, handle = melinoe.load(path, engine="fast", gpu_memory="1GiB", batch=2, context=32)
    assert handle.slots == 8 and torch.equal(generated(model), expected)
    for options in ({"gpu_memory": "1GiB", "slots": 2}, {"slots": 2, "batch": 4}):
        with pytest.raises(BudgetError):
            melinoe.load(path, engine="fast", **options)
    with pytest.raises(BudgetError, match="or more"):
        melinoe.load(path, engine="fast", gpu_memory="1MiB")


def test_the_command_line_serves_with_the_fast_engine():
    """generate --engine fast gives the reference engine's text; codes and budgets are heard."""
    import json

    from typer.testing import CliRunner

    from melinoe.cli.app import app

    said = []
    for extra in (
        ["--slots", "32"],
        ["--engine", "fast", "--gpu-memory", "2GiB", "--context", "64"],
    ):
        done = CliRunner().invoke(
            app, ["generate", "tiny", "Once", "--max-new-tokens", "3", "--json", "--device", "cpu",
                  *extra],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        said.append(json.loads(done.stdout))
    assert said[0]["text"] == said[1]["text"]
    assert said[1]["slots"] == 32
    refused = CliRunner().invoke(app, ["generate", "tiny", "Once", "--format", "int3"])
    assert refused.exit_code != 0


@pytest.mark.parametrize("name", ["int4", "int8", "mxfp4", "fp8"])
def test_the_workspace_of_packed_slots_holds_an_unpacked_matrix(name):
    """What unpacking the largest takes at once, beside what plain slots need."""
    model = tiny.tiny_model("olmoe", hidden_size=64, intermediate_size=256)
    hollow = tiny.on_meta(model)
    layers, kind = find_experts(hollow), named_format(name)
    packed = [layer.stored_as(kind) for layer in layers]
    needs = [prompt_bytes(hollow, one, 1, 64).workspace for one in (packed, layers)]
    added = needs[0] - needs[1]
    rows, columns = 2 * 256, 64
    block = kind.encode_matrix(torch.ones(rows, columns))
    with watched(block.values()) as live:
        kind.decode_matrix(block, rows, columns).to(torch.bfloat16)
    assert live.most < added < 16 * rows * columns + 3 * 4 * 64 * 2 * 64 + 1
