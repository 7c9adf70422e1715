"""An adapter of PEFT's on the router merges as PEFT merges it; what does not is named for it."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_olmoe import words_tokenizer
from tiny import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from melinoe.cli.app import app
from melinoe.errors import CheckpointError
from melinoe.finetune.adapter import CONFIG, WEIGHTS
from melinoe.finetune.saving import merge_adapter

pytestmark = pytest.mark.filterwarnings("default")  # PEFT's

IDS = torch.arange(3, 20)[None]


@pytest.fixture
def base(tmp_path):
    tiny_model("olmoe").save_pretrained(tmp_path / "base")
    words_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def made(base, place, **settings):
    """An adapter that PEFT made and moved, and the logits with it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    theirs = get_peft_model(model, LoraConfig(r=3, lora_alpha=5, **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)
        expected = theirs(IDS).logits
    theirs.save_pretrained(place)
    return expected


@torch.no_grad()
def merged(adapter, out, **options):
    merge_adapter(adapter, out, **options)
    return AutoModelForCausalLM.from_pretrained(out)(IDS).logits


KINDS = {
    "the parameter": {"target_parameters": ["mlp.gate.weight"], "target_modules": []},
    "parameter and experts": {
        "target_parameters": ["mlp.gate.weight", "experts.down_proj"],
        "target_modules": ["q_proj"],
    },
    "kept whole": {"modules_to_save": ["mlp.gate"], "target_modules": ["q_proj"]},
    "every projection": {"target_modules": "all-linear"},
    "not all alike": {
        "target_parameters": ["mlp.gate.weight", "experts.down_proj"],
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 5, "down_proj": 2},
        "alpha_pattern": {"v_proj": 2, "gate.weight": 9},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_computes_with_is_what_is_merged(kind, base, tmp_path):
    """By low-rank updates of the router's weight, beside others, or by the whole router."""
    expected = made(base, tmp_path / "adapter", **KINDS[kind])
    torch.testing.assert_close(
        merged(tmp_path / "adapter", tmp_path / "out"), expected, rtol=2e-4, atol=2e-4
    )


def test_a_router_that_was_a_linear_module_merges_too(base, tmp_path):
    """Before transformers 5 it was one, named in target_modules; the numbers lie alike."""
    adapter = tmp_path / "adapter"
    expected = made(base, adapter, **KINDS["the parameter"])
    config = json.loads((adapter / CONFIG).read_text())
    config |= {"target_parameters": None, "target_modules": ["gate"]}
    (adapter / CONFIG).write_text(json.dumps(config))
    torch.testing.assert_close(merged(adapter, tmp_path / "out"), expected, rtol=2e-4, atol=2e-4)


def test_what_is_not_merged_is_blamed_for_itself(base, tmp_path):
    """A head kept whole, experts one by one, another base: each has its own way out."""
    head, adapter = tmp_path / "head", tmp_path / "adapter"
    made(base, head, modules_to_save=["lm_head"], target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"also changes lm_head.*merge_and_unload\), which"):
        merge_adapter(head, tmp_path / "out")
    made(base, adapter, **KINDS["kept whole"])
    tensors = load_file(adapter / WEIGHTS)
    stem = "base_model.model.model.layers.0"
    for name, way_out in (
        ("mlp.experts.3.up_proj.lora_A.weight", "as in transformers 4; merge it there"),
        ("mlp.shared.lora_A.weight", "give its own base with --base"),
    ):
        save_file(tensors | {f"{stem}.{name}": torch.ones(3, 32)}, adapter / WEIGHTS)
        failed = CliRunner().invoke(app, ["merge", str(adapter), "--out", str(tmp_path / "out")])
        assert isinstance(failed.exception, CheckpointError) and way_out in str(failed.exception)
    assert not (tmp_path / "out").exists()


def test_the_base_is_found_beside_the_adapter_where_both_were_moved(base, tmp_path, monkeypatch):
    """A relative name is looked for from here, then from the adapter; a path that is gone, too."""
    expected = made(base, tmp_path / "deep" / "adapter", **KINDS["the parameter"])
    base.rename(tmp_path / "deep" / "base")
    monkeypatch.chdir(tmp_path)
    config = json.loads((tmp_path / "deep" / "adapter" / CONFIG).read_text())
    for number, name in enumerate((str(base), "../base", "deep/base")):
        config["base_model_name_or_path"] = name
        (tmp_path / "deep" / "adapter" / CONFIG).write_text(json.dumps(config))
        found = merged(tmp_path / "deep" / "adapter", tmp_path / f"out{number}")
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
