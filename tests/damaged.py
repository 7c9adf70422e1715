"""A small sharded OLMoE checkpoint, to be read, or to be damaged in known ways."""

import json
from pathlib import Path

import torch
from small_olmoe import tiny_model


def write_olmoe(out: Path, *, shard: str = "10KB", dtype=torch.float32, **settings) -> Path:
    """2 layers, 4 experts, top-2, hidden 16: several shards, in the hub's per-expert layout."""
    values = {
        "vocab_size": 64, "num_experts": 4, "max_position_embeddings": 64, "eos_token_id": 1,
        "initializer_range": 0.02,
    }  # fmt: skip
    model = tiny_model(**values | settings).to(dtype)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(out, max_shard_size=shard)
    return out


def edit_json(path: Path, change) -> None:
    """Let *change* alter the object that a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def shard_with(directory: Path, key: str) -> Path:
    """The shard that the index says holds *key*."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][key]


def rewrite(path: Path, change) -> None:
    """Let *change* alter the tensors of a shard."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def check_experts(checkpoint, weights) -> None:
    """Every expert of a checkpoint, read alone, equals its part of *weights* bit for bit."""
    for source in checkpoint.experts:
        for expert in range(source.num_experts):
            into = {t.name: torch.full(t.shape, torch.nan) for t in source.layer.tensors}
            source.read(expert, into)
            for name, tensor in into.items():
                assert torch.equal(tensor, weights[f"{source.layer.name}.{name}"][expert])
