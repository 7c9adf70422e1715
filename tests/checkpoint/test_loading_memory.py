"""A model is loaded at its own size: its experts are read when their stack is made, not before."""

import os
import weakref

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from melinoe.checkpoint import backbone
from melinoe.checkpoint.opening import open_checkpoint

LAYERS, EXPERTS = 3, 8


def test_no_more_than_one_layers_stored_experts_are_held(tmp_path, monkeypatch):
    """Of 72 stored expert tensors 24 are a layer's; transformers' own reading ahead holds all."""
    config = OlmoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "base")
    alive, most = set(), [0]
    read = backbone._Lazy.__getitem__

    def counted(self, key):
        tensor = read(self, key)
        if ".experts." in self.place.name:
            alive.add(self.place.name)
            weakref.finalize(tensor, alive.discard, self.place.name)
            most[0] = max(most[0], len(alive))
        return tensor

    monkeypatch.setattr(backbone._Lazy, "__getitem__", counted)
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    with open_checkpoint(tmp_path / "base") as checkpoint:
        model = backbone.load_model(checkpoint)
    assert 0 < most[0] <= 3 * EXPERTS
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "base")
    for name, parameter in again.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
