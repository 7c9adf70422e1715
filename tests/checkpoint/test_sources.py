"""Each expert is read alone where the family's rule allows it, and a rule is never guessed at."""

import pytest
import tiny
import torch
from damaged import check_experts

from melinoe.checkpoint import open_checkpoint
from melinoe.checkpoint.safetensors_file import SafetensorsFile
from melinoe.errors import UnsupportedModelError


@pytest.mark.parametrize("family", ["olmoe", "qwen3_vl_moe", "inkling2"])
def test_one_expert_costs_its_own_bytes_and_no_others(tmp_path, monkeypatch, family):
    """A tensor for each expert; a stack, transposed; a stack whose rows a rule interleaves."""
    saved = tiny.tiny_model(family)
    saved.save_pretrained(tmp_path)
    with open_checkpoint(str(tmp_path), torch.float32) as checkpoint:
        check_experts(checkpoint, saved.state_dict())
        read, moved = SafetensorsFile.read, []

        def counting(self, name, into, first=0):
            moved.append(into.numel() * self.tensors[name].dtype.itemsize)
            read(self, name, into, first)

        monkeypatch.setattr(SafetensorsFile, "read", counting)
        for source in checkpoint.experts:
            moved.clear()
            into = {t.name: torch.empty(t.shape) for t in source.layer.tensors}
            source.read(source.num_experts - 1, into)
            assert sum(moved) == source.layer.block_bytes


@pytest.mark.parametrize("family", sorted(tiny.ATTACHED_ONLY))
def test_a_rule_that_mixes_experts_is_refused(tmp_path, family):
    """Where no expert can be read alone, the sentence names the way that remains."""
    tiny.tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"no expert can be read alone.*attach"):
        open_checkpoint(str(tmp_path))
