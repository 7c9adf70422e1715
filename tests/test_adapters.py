"""Adapters over slots: the text of the adapted model, one adapter or another, or none."""

import asyncio
import threading

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from small_olmoe import tiny_model

import melinoe
from melinoe.adapters import Adapters
from melinoe.config import FinetuneSettings
from melinoe.errors import AttachError, CheckpointError, MelinoeError
from melinoe.finetune.adapter import adapter_of, write_adapter
from melinoe.finetune.parts import make_trainable
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers
from melinoe.serve.batching import Batches, Limits
from melinoe.serve.body import Asked, Sampling

FAMILIES = ("olmoe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4")
LIMITS = Limits(running=4, waiting=8, context=200, max_tokens=64, cache_tokens=512, chunk=16)


def trained(model, seed, train="router+experts", by=0.3):
    """Move every trained part of *model* somewhere."""
    settings = FinetuneSettings(train=train, lora_alpha=6.0, seed=seed)
    parts = make_trainable(model, find_routers(model), find_experts(model), settings, 3)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in parts.all():
            parameter.add_(torch.randn(parameter.shape), alpha=by)
    return parts


@torch.no_grad()
def output(model):
    made = model(torch.tensor([[3, 4, 5, 6, 7, 8]]))
    return made.logits if hasattr(made, "logits") else made.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["router+experts", "router+experts+attention"])
def test_slots_with_an_adapter_compute_what_was_trained(family, train, tmp_path):
    """Bit for bit, with fewer slots than experts; without it, and detached, the base is back."""
    model = tiny.tiny_model(family)
    write_adapter(adapter_of(trained(model, 1, train)), tmp_path, "base", generates=False)
    expected, served = output(model), tiny.tiny_model(family)
    plain = output(served)
    with melinoe.attach(served, slots=3) as handle:
        adapters = Adapters(served, handle)
        adapters.add("mine", tmp_path)
        assert torch.equal(output(served), plain)
        adapters.use("mine")
        assert torch.equal(output(served), expected) and not torch.equal(expected, plain)
        adapters.use(None)
        assert torch.equal(output(served), plain)
        adapters.use("mine")
    assert torch.equal(output(served), plain)


@pytest.mark.filterwarnings("default")  # PEFT's
def test_pefts_own_adapter_of_attention_and_routers_is_served(tmp_path):
    """Made by PEFT alone, a low-rank update of a router's weight among it; its outputs."""
    theirs = get_peft_model(
        tiny.tiny_model("olmoe"),
        LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "o_proj"],
                   target_parameters=["mlp.gate.weight"]),
    ).eval()  # fmt: skip
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    theirs.save_pretrained(tmp_path)
    served = tiny.tiny_model("olmoe")
    plain = output(served)
    with melinoe.attach(served, slots=3) as handle:
        adapters = Adapters(served, handle)
        adapters.add("theirs", tmp_path)
        adapters.use("theirs")
        torch.testing.assert_close(output(served), output(theirs), rtol=1e-4, atol=1e-4)
        assert (output(served) - plain).abs().max() > 0.01


def test_an_adapter_over_packed_experts_is_close_to_its_decoded_weights(tmp_path):
    """int8 blocks in the slots; the same adapter over the weights that they mean."""
    write_adapter(adapter_of(trained(tiny_model(), 3)), tmp_path, "base")
    packed, whole = tiny_model(), tiny_model()
    with melinoe.attach(packed, slots=3, format="int8") as handle:
        with torch.no_grad():
            for layer in handle.layers:
                for expert in range(layer.num_experts):
                    block = handle.engine.experts[layer.index].read(expert)
                    for name, weight in layer.format.decode(layer.tensors, block).items():
                        whole.get_submodule(layer.name).get_parameter(name)[expert] = weight
        adapters = Adapters(packed, handle)
        adapters.add("mine", tmp_path)
        adapters.use("mine")
        got = output(packed)
    with melinoe.attach(whole, slots=8) as handle:
        adapters = Adapters(whole, handle)
        adapters.add("mine", tmp_path)
        adapters.use("mine")
        torch.testing.assert_close(got, output(whole), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_served_is_refused(tmp_path):
    """A name that is taken, another model's adapter, no adapter."""
    write_adapter(adapter_of(trained(tiny_model(), 1)), tmp_path, "base")
    model = tiny_model()
    with melinoe.attach(model, slots=3) as handle:
        adapters = Adapters(model, handle)
        adapters.add("mine", tmp_path)
        with pytest.raises(MelinoeError, match="two adapters are named"):
            adapters.add("mine", tmp_path)
        with pytest.raises(CheckpointError, match="holds no adapter"):
            adapters.add("none", tmp_path / "none")
    other = tiny_model(num_hidden_layers=1)
    with melinoe.attach(other, slots=3) as handle, pytest.raises(CheckpointError):
        Adapters(other, handle).add("mine", tmp_path)


def test_requests_of_several_adapters_run_side_by_side(tmp_path):
    """Of two adapters and of none, with one prompt: each text is that of its own model."""
    expected, prompt = {}, [5, 6, 7]
    for seed, name in enumerate(("a", "b"), start=1):
        model = tiny_model()
        directory = tmp_path / name
        directory.mkdir()
        write_adapter(adapter_of(trained(model, seed)), directory, "base")
        expected[name] = text(model, prompt)
    expected[None] = text(tiny_model(), prompt)
    assert len({tuple(one) for one in expected.values()}) == 3
    model = tiny_model()
    with melinoe.attach(model, slots=4) as handle:
        adapters = Adapters(model, handle)
        for name in ("a", "b"):
            adapters.add(name, tmp_path / name)
        batches = Batches(model, handle, LIMITS, adapters=adapters)

        async def run():
            made = {}
            for name in ("a", None, "b"):
                asked = Asked(12, Sampling(temperature=0), adapter=name)
                made[name] = batches.submit(prompt, asked, "r")
            for one in made.values():
                while not (await asyncio.wait_for(one.pieces.get(), 30)).done:
                    pass
            return {name: one.tokens for name, one in made.items()}

        try:
            assert asyncio.run(run()) == expected
        finally:
            batches.stop()


def test_an_urgent_request_that_finds_no_room_waits_until_others_have_made_some(tmp_path):
    """The cache is full of another adapter's request, which goes on; both end well."""
    for seed, name in enumerate(("a", "b"), start=1):
        (tmp_path / name).mkdir()
        write_adapter(adapter_of(trained(tiny_model(), seed)), tmp_path / name, "base")
    model = tiny_model()
    with melinoe.attach(model, slots=4) as handle:
        adapters = Adapters(model, handle)
        for name in ("a", "b"):
            adapters.add(name, tmp_path / name)
        limits = LIMITS._replace(cache_tokens=128, max_tokens=200, context=200)
        batches = Batches(model, handle, limits, adapters=adapters)

        async def run():
            asked = Asked(110, Sampling(temperature=0), priority=5, adapter="b")
            slow = batches.submit([5, 6, 7], asked, "slow")
            while len(slow.tokens) < 95:
                await asyncio.wait_for(slow.pieces.get(), 30)
            asked = Asked(5, Sampling(temperature=0), adapter="a")
            urgent = batches.submit([3 + i % 20 for i in range(60)], asked, "urgent")
            errors = []
            for one in (slow, urgent):
                while not (piece := await asyncio.wait_for(one.pieces.get(), 30)).done:
                    pass
                errors.append(piece.error)
            return errors, len(slow.tokens), len(urgent.tokens)

        try:
            assert asyncio.run(run()) == ([None, None], 110, 5)
        finally:
            batches.stop()


def text(model, prompt):
    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                          do_sample=False, pad_token_id=0)  # fmt: skip
    return made[0, len(prompt) :].tolist()


def test_an_engine_that_captures_steps_takes_no_adapter():
    """One sentence that names the engine which does."""

    class Captured:
        engine = type("Engine", (), {"name": "device"})

    with pytest.raises(AttachError, match="engine='reference'"):
        Adapters(tiny_model(), Captured())


def test_an_adapter_is_changed_between_passes_only(tmp_path):
    """Another thread waits until the pass that runs is over."""
    write_adapter(adapter_of(trained(tiny_model(), 1)), tmp_path, "base")
    model = tiny_model()
    with melinoe.attach(model, slots=3) as handle:
        adapters = Adapters(model, handle)
        adapters.add("mine", tmp_path)
        changing = threading.Thread(target=adapters.use, args=("mine",))
        with handle.lock:
            changing.start()
            changing.join(0.2)
            assert changing.is_alive()
        changing.join(300)
        assert not changing.is_alive()
