"""Every decorated family's checkpoint layout, read expert by expert as transformers reads it."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from melinoe.checkpoint import load_backbone, open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

FAMILIES = [family for family in tiny.families() if family not in tiny.CANNOT]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_equals_from_pretrained(family, tmp_path):
    """Backbone and buffers, and each expert read alone, are from_pretrained's bit for bit."""
    model = tiny.tiny_model(family)
    model.save_pretrained(tmp_path)
    expected = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    weights = expected.state_dict() | dict(expected.named_buffers())
    del model
    with open_checkpoint(str(tmp_path), torch.float32) as checkpoint:
        loaded = load_backbone(checkpoint)
        stacked = {f"{x.name}.{t.name}" for x in checkpoint.layers for t in x.tensors}
        own = loaded.state_dict() | dict(loaded.named_buffers())
        assert own.keys() == weights.keys()
        for name in own.keys() - stacked:
            assert torch.equal(own[name], weights[name]), name
        for source in checkpoint.experts:
            for expert in range(source.num_experts):
                into = {t.name: torch.full(t.shape, torch.nan) for t in source.layer.tensors}
                source.read(expert, into)
                for name, tensor in into.items():
                    assert torch.equal(tensor, weights[f"{source.layer.name}.{name}"][expert])
    gc.collect()
