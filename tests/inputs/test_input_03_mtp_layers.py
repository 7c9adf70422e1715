"""Layers for predicting several tokens are in the output, as its config goes on to promise."""

import json

import torch
from safetensors.torch import load_file, save_file
from small_olmoe import words_tokenizer
from tiny import tiny_model

from melinoe.config import FinetuneSettings
from melinoe.data import Example
from melinoe.finetune import finetune
from melinoe.finetune.saving import merge_adapter


def glm_with_mtp(place):
    """A tiny GLM-4-MoE whose files have a third layer that transformers leaves out."""
    tiny_model("glm4_moe", dtype=torch.bfloat16).save_pretrained(place)
    words_tokenizer().save_pretrained(place)
    file, config = place / "model.safetensors", place / "config.json"
    tensors = load_file(file)
    shapes = {"eh_proj.weight": (32, 64), "enorm.weight": (32,), "shared_head.norm.weight": (32,)}
    more = {f"model.layers.2.{name}": torch.randn(shape) for name, shape in shapes.items()}
    more["model.layers.2.mlp.gate.e_score_correction_bias"] = torch.randn(8)
    save_file(tensors | more, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}))
    return more


def test_what_transformers_does_not_load_is_written_all_the_same(tmp_path):
    """By finetune and by merge: every name, its bytes, and the config that promises a layer."""
    base = tmp_path / "base"
    more = glm_with_mtp(base)
    settings = FinetuneSettings(
        capacity=0.5, steps=1, batch_size=1, lora_rank=2, learning_rate=1e-2, save="both"
    )
    finetune(base, [Example("w3 w4", " w5 w6 w7", "here")], tmp_path / "tuned", settings)
    merge_adapter(tmp_path / "tuned" / "adapter", tmp_path / "merged")
    before = load_file(base / "model.safetensors")
    for out in ("tuned", "merged"):
        after = load_file(tmp_path / out / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(after[name].dtype == before[name].dtype for name in before)
        assert all(torch.equal(after[name], tensor) for name, tensor in more.items())
        moved = {name for name in before if not torch.equal(after[name], before[name])}
        assert moved and all(".mlp." in name for name in moved)
        assert (tmp_path / out / "config.json").read_text() == (base / "config.json").read_text()
