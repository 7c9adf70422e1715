"""A tiny random OLMoE, a tokenizer of whole words and a predictor of fixed mind, for tests."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from melinoe.moe.routing import fingerprint
from melinoe.predictor import Predictor
from melinoe.predictor.model import PredictorNetwork, token_embeddings

LAYERS, EXPERTS, TOP_K = 2, 8, 2


def tiny_model(seed=0, **settings):
    """In evaluation mode; *settings* of its configuration may be others."""
    values = dict(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, initializer_range=0.5, pad_token_id=0, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return OlmoeForCausalLM(OlmoeConfig(**values | settings)).eval()


def write_checkpoint(place, seed=0):
    """In the hub's layout, with the tokenizer of words."""
    tiny_model(seed).save_pretrained(place)
    words_tokenizer().save_pretrained(place)
    return place


def words_tokenizer():
    """Words w2 ... w31 are tokens 2 ... 31; nothing is added in front."""
    vocabulary = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 32)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


PROMPT_TEXT = "w3 w4 w5 w6"


def always(model, experts):
    """A predictor that ranks *experts* first in every layer, whatever the prompt."""
    network = PredictorNetwork(32, 4, (LAYERS, EXPERTS), 0.0)
    with torch.no_grad():
        network.output.weight.zero_()
        bias = torch.zeros(LAYERS, EXPERTS)
        for rank, expert in enumerate(experts):
            bias[:, expert] = 10 - rank
        network.output.bias.copy_(bias.flatten())
    popularity = np.full((LAYERS, EXPERTS), 1 / EXPERTS, np.float32)
    return Predictor(network, token_embeddings(model), popularity, fingerprint(model), 3)
