"""Adapters in PEFT's files: PEFT loads ours, ours loads PEFT's, and bad ones are refused."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from melinoe.config import FinetuneSettings
from melinoe.errors import CheckpointError
from melinoe.finetune.adapter import (
    CONFIG,
    WEIGHTS,
    adapter_of,
    read_adapter,
    read_adapter_config,
    write_adapter,
)
from melinoe.finetune.parts import make_trainable
from melinoe.moe.experts import find_experts
from melinoe.moe.routing import find_routers

# One of each layout of experts; correction bias, router bias and a gate with parts among routers.
FAMILIES = (
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "deepseek_v3",
    "aria",
    "gpt_oss",
    "nemotron_h",
    "gemma4",
    "openai_privacy_filter",
)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [20, 3, 40, 7, 60, 11]])


@torch.no_grad()
def output(model):
    torch.manual_seed(1)
    result = model(input_ids=IDS)
    return result.logits if "logits" in result else result.last_hidden_state


def trained(family="olmoe", **changes):
    """A model as training leaves it: every factor and every router moved."""
    settings = FinetuneSettings(**{"lora_rank": 3, "lora_alpha": 6.0} | changes)
    model = tiny.tiny_model(family)
    parts = make_trainable(
        model, find_routers(model), find_experts(model), settings, settings.lora_rank
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in parts.lora.items():
            if ".lora_B" in name:
                parameter.normal_(std=0.2)
        for parameter in parts.router.values():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return model, parts


@pytest.fixture
def directory(tmp_path):
    """The adapter of a trained tiny OLMoE."""
    write_adapter(adapter_of(trained()[1]), tmp_path, "base")
    return tmp_path


@pytest.mark.filterwarnings("default")  # warnings of modelling files and of PEFT
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["router+experts", "router+experts+attention"])
def test_peft_loads_our_adapter(family, train, tmp_path):
    """PeftModel.from_pretrained on a fresh base gives the trained model's outputs."""
    model, parts = trained(family, train=train)
    generates = hasattr(model, "prepare_inputs_for_generation")
    write_adapter(adapter_of(parts), tmp_path, "some/base", generates=generates)
    base = tiny.tiny_model(family)
    plain = output(base)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(output(loaded.base_model.model), output(model), rtol=1e-4, atol=1e-4)
    assert (output(model) - plain).abs().max() > 0.05


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_adapter_loads_here(family, tmp_path):
    """Made, moved and saved by PEFT alone, a linear module among it; applied here, its outputs."""
    base = tiny.tiny_model(family)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"],
        modules_to_save=[router.name for router in find_routers(base)],
    )
    theirs = get_peft_model(base, config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    theirs.save_pretrained(tmp_path)
    expected = output(theirs.base_model.model)
    model = tiny.tiny_model(family)
    read_adapter(tmp_path, model).apply(model)
    torch.testing.assert_close(output(model), expected, rtol=2e-4, atol=2e-4)


def test_what_is_read_is_what_was_written(directory):
    """Every factor and router tensor, bit for bit; routers in float32 whatever the base has."""
    parts = trained()[1]
    read = read_adapter(directory, tiny.tiny_model("olmoe", dtype=torch.bfloat16))
    kept = adapter_of(parts)
    assert (read.rank, read.scaling) == (3, 2.0)
    assert read.factors.keys() == kept.factors.keys() and read.routers.keys() == kept.routers.keys()
    for name, projections in kept.factors.items():
        for projection, pair in projections.items():
            assert all(map(torch.equal, read.factors[name][projection], pair))
    for name, state in kept.routers.items():
        assert read.routers[name]["weight"].dtype == torch.float32
        assert torch.equal(read.routers[name]["weight"], state["weight"])


@pytest.mark.filterwarnings("default")
def test_an_adapter_of_routers_alone_is_read_and_loads_in_peft(tmp_path):
    """With train="router" there are no factors, and PEFT still takes the directory."""
    model, parts = trained(train="router")
    write_adapter(adapter_of(parts), tmp_path, "base")
    read = tiny.tiny_model("olmoe")
    read_adapter(tmp_path, read).apply(read)
    assert torch.equal(output(read), output(model))
    theirs = PeftModel.from_pretrained(tiny.tiny_model("olmoe"), tmp_path).eval()
    assert torch.equal(output(theirs.base_model.model), output(model))


def test_an_adapter_of_another_shape_is_refused(directory):
    """The message names the tensor and both shapes."""
    with pytest.raises(CheckpointError, match=r"does not fit .*lora_A.*--base"):
        read_adapter(directory, tiny.tiny_model("olmoe", num_experts=4))
    with pytest.raises(CheckpointError, match=r"gate\.weight, and .* nothing of that name.*--base"):
        read_adapter(directory, tiny.tiny_model("gpt_oss"))


def damage_config(directory, **changes):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "kind IA3, not LORA"),
        ({"fan_in_fan_out": True}, "more than projections.*fan_in_fan_out"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changed the base"),
        ({"init_lora_weights": "olora"}, "olora, which changed the base"),
        ({"r": None}, "it has no 'r'"),
        ({"r": 0}, "a rank of 0"),
        ({"rank_pattern": {"x": "3"}}, "rank_pattern.x is not a whole number"),
        ({"rank_pattern": {"(": 3}}, "not readable"),
        ({"alpha_pattern": [1]}, "alpha_pattern is not an object"),
        ({"lora_alpha": "16"}, "lora_alpha is not a finite number"),
        ({"target_parameters": "gate"}, "target_parameters is not a list"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is not a text"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(directory, changes, words):
    """One sentence each, and PEFT's own merge named as the way out."""
    damage_config(directory, **changes)
    with pytest.raises(CheckpointError, match=words):
        read_adapter_config(directory)


def test_what_is_no_adapter_is_refused(directory, tmp_path_factory):
    """Nothing there, no weights, a torn config, torn weights."""
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_adapter_config(empty)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_adapter_config(empty / "absent")
    shutil.copy(directory / CONFIG, empty)
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_adapter_config(empty)
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not readable"):
        read_adapter(directory, tiny.tiny_model("olmoe"))
    (directory / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="not readable"):
        read_adapter_config(directory)


def test_tensors_that_belong_to_nothing_are_refused(directory):
    """An adapter of a norm, say; and those of which a factor is missing."""
    tensors = load_file(directory / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_norm.lora_A.weight"
    save_file(tensors | {key: torch.zeros(3, 32)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"also changes model\.layers\.0\.self_attn\.q_norm"):
        read_adapter(directory, tiny.tiny_model("olmoe"))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {key: torch.zeros(3, 32)}, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds nothing for .*self_attn\.q_proj\.lora_B"):
        read_adapter(directory, tiny.tiny_model("olmoe"))
    del tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"]
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds nothing for .*layers\.1\.mlp\.experts"):
        read_adapter(directory, tiny.tiny_model("olmoe"))
