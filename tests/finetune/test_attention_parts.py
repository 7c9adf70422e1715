"""Low-rank updates of attention: PEFT's numbers, in every family, merged."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from small_runs import examples, settings

from melinoe.config import FinetuneSettings
from melinoe.finetune import train
from melinoe.finetune.adapter import adapter_of
from melinoe.finetune.parts import LowRankUpdates, make_trainable
from melinoe.moe.attention import find_attention
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers

ALL = "router+experts+attention"
FAMILIES = [family for family in tiny.families() if family not in tiny.CANNOT]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 40, 7, 60, 11]])


def parts_of(model, **changes):
    chosen = FinetuneSettings(**{"train": ALL, "lora_rank": 3, "lora_alpha": 6.0} | changes)
    return make_trainable(model, find_routers(model), find_experts(model), chosen, chosen.lora_rank)


def moved(parts, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parts.lora.items():
            if ".lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return parts


@torch.no_grad()
def output(model):
    return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("default:.*gradient_checkpointing.*:FutureWarning")  # of PEFT
def test_outputs_and_gradients_are_pefts():
    """Same factors in PEFT's Linear, in float64: same logits, same gradients of every factor."""
    ours, base = tiny.tiny_model("olmoe").double(), tiny.tiny_model("olmoe").double()
    for model in (ours, base):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    attention = find_attention(ours, find_experts(ours))
    updates = LowRankUpdates(ours, [], 3, 6.0, 0, attention=attention)
    for parameter in updates.parameters().values():
        parameter.data = parameter.data.double()
    names = list(updates.attention)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=names))
    inside = theirs.base_model.model
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            module, own = inside.get_submodule(name), updates.of(name)
            b = own.lora_B["weight"]
            b.copy_(0.2 * torch.randn(b.shape, generator=generator))
            module.lora_A["default"].weight.copy_(own.lora_A["weight"])
            module.lora_B["default"].weight.copy_(b)
    losses = [m(input_ids=IDS).logits.square().mean() for m in (ours, inside)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    for name in names:
        module, own = inside.get_submodule(name), updates.of(name)
        for mine, other in ((own.lora_A, module.lora_A), (own.lora_B, module.lora_B)):
            assert mine["weight"].grad.abs().max() > 0
            torch.testing.assert_close(
                mine["weight"].grad, other["default"].weight.grad, rtol=1e-9, atol=0
            )


def test_updates_start_at_zero_and_equally_for_a_seed():
    """The model is the base until the first step; A depends on the seed alone."""
    model = tiny.tiny_model("olmoe")
    plain = output(model)
    first = parts_of(model)
    assert torch.equal(output(model), plain)
    second, third = parts_of(tiny.tiny_model("olmoe")), parts_of(tiny.tiny_model("olmoe"), seed=1)
    name = "model.layers.0.self_attn.q_proj.low_rank.lora_A.weight"
    assert torch.equal(first.lora[name], second.lora[name])
    assert not torch.equal(first.lora[name], third.lora[name])
    assert first.lora[name].abs().max() <= 32**-0.5


@pytest.mark.filterwarnings("default")  # warnings of modelling files are not ours to mend
@pytest.mark.parametrize("family", FAMILIES)
def test_every_update_acts_in_every_family(family):
    """
    Each projection's B gets a gradient, but for those that only choose which keys are looked at,
    and those of a compressor that starts at the 128th token.

    A projection whose weight its module used without calling it would get none.
    """
    model = tiny.tiny_model(family)
    for parameter in model.parameters():
        if not parameter.any():  # a scale of nought, in a family, hides queries and keys
            parameter.data.fill_(0.5)
    parts = parts_of(model)
    torch.manual_seed(1)
    result = model(input_ids=torch.randint(3, tiny.VOCAB, (2, 40)))
    (result.logits if "logits" in result else result.last_hidden_state).square().sum().backward()
    # Of the sparse attention's indexer; named alike in all families that have one.
    choosing = ("wq_b", "wk", "weights_proj", "index_qk_proj")
    others = (*choosing, "compressor.kv_proj", "compressor.gate_proj")
    dead = [
        name
        for name in parts.updates.attention
        if (grad := parts.updates.of(name).lora_B["weight"].grad) is None or not grad.any()
    ]
    assert [name for name in dead if not name.endswith(others)] == []
    assert len(dead) < len(parts.updates.attention)


def test_merging_gives_the_trained_models_logits():
    """Trained, then plain: the same outputs from weights of the old names, updates gone."""
    model = tiny.tiny_model("olmoe")
    names = [name for name, _ in model.named_parameters()]
    parts = moved(parts_of(model))
    trained, plain = output(model), output(tiny.tiny_model("olmoe"))
    adapter = adapter_of(parts)
    parts.updates.remove()
    adapter.apply(model)
    torch.testing.assert_close(output(model), trained, rtol=1e-5, atol=1e-5)
    assert (trained - plain).abs().max() > 0.01
    assert [name for name, _ in model.named_parameters()] == names


def test_a_run_moves_attention_only_where_it_is_asked_for():
    """Two steps; all else that is frozen stays bit for bit."""
    before = dict(tiny.tiny_model("olmoe").named_parameters())
    changed = {}
    for parts in ("router+experts", ALL):
        model = tiny.tiny_model("olmoe")
        train(model, examples(), settings(train=parts), pad_token_id=0)
        changed[parts] = {
            name for name, now in model.named_parameters() if not torch.equal(now, before[name])
        }
    attention = {f"{name}.weight" for name in find_attention(model, find_experts(model))}
    assert changed[ALL] - changed["router+experts"] == attention
    assert not changed["router+experts"] & attention
