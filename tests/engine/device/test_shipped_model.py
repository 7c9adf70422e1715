"""On the trained model that ships: long texts equal the plain model's, whichever engine."""

import pytest
import torch
from library_bits import LibraryBits
from transformers import AutoModelForCausalLM

from melinoe import attach
from melinoe.cache.simulator import simulate
from melinoe.shipped import TINY_OLMOE

PROMPTS = torch.arange(100, 100 + 4 * 12).reshape(4, 12)


@pytest.fixture(scope="module")
def model():
    model = AutoModelForCausalLM.from_pretrained(TINY_OLMOE, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def generate(model, batch, tokens):
    """Greedy, past any end of text, with the logits of every step."""
    return model.generate(
        PROMPTS[:batch],
        attention_mask=torch.ones_like(PROMPTS[:batch]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
    )


@pytest.mark.parametrize(
    ("policy", "slots", "batch", "tokens"),
    [
        ("lru", 4, 1, 8),  # as many slots as a token needs
        ("lfu", 8, 1, 32),
        ("lru", 16, 4, 8),
        ("lfu", 32, 4, 5),  # everything resident in the end
    ],
)
def test_tokens_and_logits_are_bit_identical_over_long_texts(model, policy, slots, batch, tokens):
    """To the plain model with all experts resident; counts are the simulator's."""
    expected = generate(model, batch, tokens)
    with attach(model, engine="fast", slots=slots, policy=policy) as handle:
        with handle.record() as recorder:
            found = generate(model, batch, tokens)
        counted, prefill = handle.counters, handle.prefill
        assert handle.fallbacks == 0
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(one, other)
    assert simulate(recorder.trace(), slots, policy, prefill=prefill).counters == counted
    assert counted.loads[1].sum() > 0 or slots == 32


@pytest.mark.parametrize(("policy", "slots"), [("lru", 8)])
def test_tokens_equal_the_reference_engines(model, policy, slots):
    """The same text from both engines, though their prompts fill the slots otherwise."""
    texts = []
    for engine in ("reference", "fast"):
        with attach(model, engine=engine, slots=slots, policy=policy):
            texts.append(generate(model, 1, 12).sequences)
    assert torch.equal(*texts)


def test_each_layer_gives_the_librarys_bits_on_as_many_experts(model):
    """The engine adds nothing of its own; and on the CPU fewer experts change no bit."""
    library = LibraryBits(model)
    with attach(model, engine="fast", slots=8) as handle:
        handle.prefetch([range(8)] * 4)  # every slot full
        library.watch(handle)
        generate(model, 1, 12)
    assert library.compared == 11 * 4
    assert library.engine == library.fewer == library.compared


def test_a_wrong_bit_of_the_engines_shows(model, monkeypatch):
    """One expert swapped for its neighbour: the control of the test above."""
    library = LibraryBits(model)
    library.whole[2] = {name: tensor.roll(1, 0) for name, tensor in library.whole[2].items()}
    with attach(model, engine="fast", slots=8) as handle:
        handle.prefetch([range(8)] * 4)
        library.watch(handle)
        generate(model, 1, 4)
    assert (library.compared, library.engine) == (3 * 4, 3 * 3)
