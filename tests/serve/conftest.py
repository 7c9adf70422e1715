"""One server process for all tests, and the same model here, all of it resident."""

import pytest
from serving import TEMPLATE, Server

from melinoe.shipped import TINY_OLMOE


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Four requests at once, one that waits; 256 tokens, of which 64 are written."""
    made = Server(
        tmp_path_factory.mktemp("serve"), "--requests", "4", "--waiting", "1", "--max-context",
        "256", "--max-tokens", "64", "--chunk", "32",
    )  # fmt: skip
    yield made
    assert made.process.poll() is None, made.log.read_text()
    made.stop()


@pytest.fixture
def client(server):
    """OpenAI's own client."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def offline():
    """The same model here, all of it resident, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(TINY_OLMOE)
    tokenizer.chat_template = TEMPLATE

    def write(prompt, tokens):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    return write, model, tokenizer
