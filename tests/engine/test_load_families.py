"""Every decorated family's checkpoint layout, read expert by expert as transformers reads it."""

import pytest
import tiny
import torch

import melinoe
from melinoe.stores.store import read_block

FAMILIES = [f for f in tiny.families() if f not in {*tiny.CANNOT, *tiny.ATTACHED_ONLY}]
IDS = torch.randint(3, tiny.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def output(model) -> torch.Tensor:
    """Logits, or the hidden states of a family that has none, of a call that may draw numbers."""
    torch.manual_seed(1)
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def tensors(model) -> dict[str, torch.Tensor]:
    """All parameters and buffers by name; tied ones by each of their names."""
    every = model.named_parameters(remove_duplicate=False)
    return {**dict(every), **dict(model.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_to_the_model_that_was_saved(family, tmp_path):
    """
    Backbone and buffers, and each expert read alone, are the saved model's bit for bit; offloaded
    to disk with fewer slots than experts, its output is eager's.
    """
    saved = tiny.tiny_model(family)
    saved.save_pretrained(tmp_path)
    weights = tensors(saved)
    model, handle = melinoe.load(tmp_path, "cpu", slots=3, store="disk", dtype="float32")
    own = tensors(model)
    assert own.keys() == weights.keys()
    stacked = set()
    for layer in handle.layers:
        for expert in range(layer.num_experts):
            for name, tensor in read_block(layer, handle.store, expert).items():
                assert torch.equal(tensor, weights[f"{layer.name}.{name}"][expert])
                stacked.add(f"{layer.name}.{name}")
    for name in own.keys() - stacked:
        assert torch.equal(own[name], weights[name]), name
    saved.set_experts_implementation("eager")
    torch.testing.assert_close(output(model), output(saved), atol=1e-5, rtol=1e-4)
    assert sum(map(sum, handle.counters.loads)) > 0
