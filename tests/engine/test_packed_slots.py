"""Slots of packed experts serve what the unpacked weights would, whatever is resident."""

from copy import deepcopy

import pytest
import tiny
import torch
from damaged import write_olmoe
from packed_checkpoints import gptq, write_packed

import melinoe
from melinoe import attach
from melinoe.cache.simulator import simulate
from melinoe.cache.timing import Machine, Work
from melinoe.engine.misses import Misses
from melinoe.errors import AttachError, UnsupportedModelError
from melinoe.experts.formats import named_format
from melinoe.moe.experts import find_experts

PROMPT = torch.tensor([[3, 17, 5, 9, 60, 2, 44, 8, 31, 30, 12, 6]])
ON_HOST = Misses("cpu", Machine(link_bytes_per_s=1.0, dram_bytes_per_s=1.5), Work(expert_bytes=3.0))
# mxfp4 needs rows of 32 or more.
SIZES = {"moe_intermediate_size": 32, "intermediate_size": 32, "hidden_size": 32}


def unpacked(model, name):
    """The model with the weights that its packed experts mean."""
    model, kind = deepcopy(model), named_format(name)
    with torch.no_grad():
        for layer in find_experts(model):
            for expert in range(layer.num_experts):
                own = {t.name: layer.module.get_parameter(t.name)[expert] for t in layer.tensors}
                block = kind.encode(layer.tensors, own)
                for tensor, meant in kind.decode(layer.tensors, block).items():
                    own[tensor].copy_(meant)
    return model


def logits(model):
    with torch.no_grad():
        return model(PROMPT).logits


def tokens(model, count=64):
    return model.generate(
        PROMPT, max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [("olmoe", "int4"), ("olmoe", "fp8"), ("olmoe", "mxfp4"), ("gpt_oss", "int8"),
     ("gpt_oss", "mxfp4"), ("nemotron_h", "int4")],
)  # fmt: skip
def test_text_is_that_of_the_unpacked_weights(family, name):
    """64 greedy tokens; logits within the order of summation; the packing itself is seen."""
    settings = SIZES if name == "mxfp4" else {}
    model = tiny.tiny_model(family, **settings)
    exact, expected = logits(model), unpacked(model, name)
    with attach(model, slots=3, format=name) as handle:
        found = logits(model)
        assert handle.audit() > 0
        assert torch.equal(tokens(model), tokens(expected))
    true = logits(expected)
    assert float((found - true).abs().max()) <= 2e-5 * float(true.abs().max())
    assert not torch.allclose(found, exact, rtol=1e-3)
    assert torch.equal(logits(model), logits(expected))  # detached, it holds what the blocks mean


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_what_is_resident(model, bf16_model, dtype):
    """Any number of slots, any prefetch, on the host or in a slot; of a prompt and of a step."""
    first = model if dtype == "float32" else bf16_model
    found = []
    for slots, miss in ((8, "wait"), (1, "wait"), (3, "wait"), (2, ON_HOST)):
        model = deepcopy(first)
        with attach(model, slots=slots, miss=miss, format="int4") as handle, torch.no_grad():
            handle.prefetch([[5], [0]])
            found.append((logits(model), model(PROMPT[:, :1]).logits, tokens(model, 12)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("miss", ["wait", ON_HOST])
def test_counts_and_bytes_are_those_of_blocks(model, miss):
    """Simulated from the trace; a transfer carries a packed block, and slots are made of them."""
    with attach(model, slots=3, miss=miss, format="int4") as handle:
        with handle.record() as recorder:
            tokens(model, 8)
        counted, layer = handle.counters, handle.layers[0]
        options = {} if miss == "wait" else {"load": miss.rule}
        assert simulate(recorder.trace(), 3, **options).counters == counted
        moved = int(counted.loads.sum()) * layer.block_bytes
        assert handle.transferred_bytes == moved
        assert handle.expert_memory_bytes == 2 * 3 * layer.block_bytes
        # 32 weights of 4 bits share a scale and a shift of 8.
        assert layer.block_bytes == 3 * 32 * 32 * 9 // 16


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    return write_olmoe(tmp_path_factory.mktemp("packed") / "olmoe")


@pytest.mark.parametrize("name", ["int8", "mxfp4"])
def test_a_checkpoint_is_packed_while_it_is_loaded(olmoe, name):
    """As a model in memory would be, with as many slots and blocks; plain asks for nothing."""
    if name == "mxfp4":
        with pytest.raises(UnsupportedModelError, match="choose int4 or int8"):
            melinoe.load(olmoe, device="cpu", slots=2, format=name)
        return
    loaded, handle = melinoe.load(olmoe, device="cpu", slots=2, format=name)
    assert handle.store.kind == "ram" and handle.store.format(0).name == name
    same, _ = melinoe.load(olmoe, device="cpu", slots=2, format="plain", store="disk")
    with attach(expected := unpacked_copy(olmoe), slots=2, format=name):
        assert torch.equal(logits(loaded), logits(expected))
    assert not torch.equal(logits(same), logits(loaded))


def test_a_packed_checkpoint_keeps_its_own_codes_if_they_have_the_name(tmp_path):
    """GPTQ has zero points where ours have minimums; rounding again would lose."""
    path = write_packed(tmp_path, gptq())
    stored = melinoe.load(path, device="cpu", slots=2)[1].store
    asked = melinoe.load(path, device="cpu", slots=2, format="int4", store="disk")[1].store
    assert asked.format(0) == stored.format(0) != named_format("int4")


def unpacked_copy(path):
    model, handle = melinoe.load(path, device="cpu", slots=2)
    handle.detach()
    return model


def test_what_cannot_be_packed_or_kept_is_refused(olmoe, model):
    """Before anything moves, with the way out."""
    expected = logits(model)
    with pytest.raises(AttachError, match=r"choose one of .*int4"):
        attach(model, format="int3")
    with pytest.raises(AttachError, match="choose the ram or pinned store"):
        melinoe.load(olmoe, device="cpu", slots=2, format="int4", store="disk")
    with attach(model, slots=2) as handle:
        pass
    with pytest.raises(AttachError, match="leave format out"):
        attach(model, slots=2, store=handle.store, format="int4")
    assert torch.equal(logits(model), expected)


def test_a_packed_store_serves_another_model(model):
    """The second model's own weights must be those that were packed."""
    other, third = deepcopy(model), deepcopy(model)
    with attach(model, slots=2, format="int8") as handle:
        with attach(other, slots=8, store=handle.store):
            assert torch.equal(logits(other), logits(model))
        with torch.no_grad():
            third.model.layers[0].mlp.experts.down_proj[-1].mul_(2)
        with pytest.raises(AttachError, match="other experts"):
            attach(third, slots=2, store=handle.store)


def test_a_packed_backbone_is_loaded_by_option(tmp_path):
    """Attention and head packed, routers and embedding not; close to the plain model's logits."""
    path = write_olmoe(tmp_path / "model", hidden_size=32, intermediate_size=32)
    plain, _ = melinoe.load(path, slots=3)
    packed, _ = melinoe.load(path, slots=3, backbone="int8")
    assert type(packed.lm_head).__name__ == "PackedLinear"
    assert type(packed.model.layers[0].self_attn.q_proj).__name__ == "PackedLinear"
    assert torch.equal(
        packed.model.layers[0].mlp.gate.weight, plain.model.layers[0].mlp.gate.weight
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=0.1, atol=0.02)
