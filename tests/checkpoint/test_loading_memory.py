"""A model is loaded at its own size: each expert is read straight into its place in the stack."""

import os

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from melinoe.checkpoint import backbone
from melinoe.checkpoint.opening import open_checkpoint

LAYERS, EXPERTS = 3, 8


def test_no_stored_expert_is_held_beside_the_model(tmp_path, monkeypatch):
    """transformers, which holds each stored tensor until its stack is made, is given none of 72."""
    config = OlmoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "base")
    given = []
    read = backbone._Lazy.__getitem__

    def counted(self, key):
        given.append(self.place.name)
        return read(self, key)

    monkeypatch.setattr(backbone._Lazy, "__getitem__", counted)
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    with open_checkpoint(tmp_path / "base") as checkpoint:
        model = backbone.load_model(checkpoint)
    assert given and not any(".experts." in name for name in given)
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "base")
    for name, parameter in again.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
