"""Every decorated family's checkpoint layout, read expert by expert as transformers reads it."""

import gc

import pytest
import tiny
import torch
from damaged import check_experts

import melinoe
from melinoe.checkpoint import load_backbone, open_checkpoint

FAMILIES = [family for family in tiny.families() if family not in tiny.CANNOT]
IDS = torch.randint(3, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def output(model) -> torch.Tensor:
    """Logits, or the hidden states of a family that has none, of a call that may draw numbers."""
    torch.manual_seed(1)
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result["logits"] if "logits" in result else result["last_hidden_state"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_to_the_model_that_was_saved(family, tmp_path):
    """
    Backbone and buffers, and each expert read alone, are the saved model's bit for bit; offloaded
    to disk with fewer slots than experts, its output is eager's.
    """
    saved = tiny.tiny_model(family)
    saved.save_pretrained(tmp_path)
    weights = saved.state_dict() | dict(saved.named_buffers())
    with open_checkpoint(str(tmp_path), torch.float32) as checkpoint:
        loaded = load_backbone(checkpoint)
        stacked = {f"{x.name}.{t.name}" for x in checkpoint.layers for t in x.tensors}
        own = loaded.state_dict() | dict(loaded.named_buffers())
        assert own.keys() == weights.keys()
        for name in own.keys() - stacked:
            assert torch.equal(own[name], weights[name]), name
        check_experts(checkpoint, weights)
    saved.set_experts_implementation("eager")
    model, handle = melinoe.load(tmp_path, slots=3, store="disk", dtype="float32")
    torch.testing.assert_close(output(model), output(saved), atol=1e-5, rtol=1e-4)
    assert sum(map(sum, handle.counters.loads)) > 0
    del saved, loaded, model, handle, weights, own
    gc.collect()  # the tests of all families must fit into memory together
