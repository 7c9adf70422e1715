"""However `generate` goes, prompt, completion and padding are told apart; nothing compiles."""

import logging

import pytest
import tiny
import torch
from transformers import GenerationConfig

from melinoe import attach
from melinoe.cache.simulator import simulate
from melinoe.errors import TraceError

PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
BATCH = torch.tensor([[0, 0, 11, 12], [5, 6, 7, 8], [0, 9, 3, 4]])  # 0 is padding, on the left
MASK = (BATCH != 0).long()
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


def traced(model, *arguments, slots=3, **options):
    """What `generate` returned, the trace, the counters; simulated and measured counts agree."""
    with attach(model, slots=slots) as handle:
        with handle.record() as recorder:
            tokens = model.generate(*arguments, **(GREEDY | options))
        trace, counters = recorder.trace(), handle.counters
    assert simulate(trace, slots).counters == counters
    return tokens, trace, counters


@pytest.fixture
def assistant():
    """A smaller mind than the model's: it guesses some tokens right and some wrong."""
    return tiny.tiny_model("olmoe", seed=0, num_hidden_layers=1)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_passes_that_verify_guesses_are_completion(model, assistant, way):
    """Several tokens a pass, none the prompt's: one sequence, one prompt pass, the same text."""
    options = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {}
    if way == "assistant":
        options = {"assistant_model": assistant}
    expected = model.generate(PROMPT, **GREEDY)
    tokens, trace, counters = traced(model, PROMPT, **options)
    assert torch.equal(tokens, expected)
    assert trace.num_sequences == 1
    assert (trace.kind[:10] == 0).all() and (trace.kind[10:] == 1).all()
    assert counters.forwards[0] == 1
    assert 1 <= counters.forwards[1] <= 7
    # Each new token but the last was computed once, and wrong guesses besides.
    assert len(trace.completion(0)) >= 7
    sizes = torch.bincount(torch.from_numpy(trace.forward).long())
    assert sizes[1:].max() > 1


def test_a_prompt_of_one_token_and_a_chunk_of_one_are_prompt(model):
    """One token begins a text; and a prompt of ten, in chunks of three, ends in a chunk of one."""
    _, trace, counters = traced(model, PROMPT[:, :1])
    assert trace.kind.tolist() == [0] + [1] * 7
    expected = model.generate(PROMPT, **GREEDY)
    tokens, trace, counters = traced(model, PROMPT, prefill_chunk_size=3)
    assert torch.equal(tokens, expected)
    assert trace.kind.tolist() == [0] * 10 + [1] * 7
    assert counters.forwards.tolist() == [4, 7]
    assert trace.num_sequences == 1


def test_a_conversation_that_goes_on_is_prompt_where_it_is_new(model):
    """The cache of the first turn is kept; the second turn's two new tokens are its prompt."""
    with attach(model, slots=3) as handle, handle.record() as recorder:
        first = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, torch.tensor([[9, 10]])], dim=1)
        model.generate(longer, **GREEDY, past_key_values=first.past_key_values)
    kinds = recorder.trace().kind.tolist()
    # The last token of the first turn was never computed, so three rows are new.
    assert kinds == [0] * 10 + [1] * 7 + [0] * 3 + [1] * 7


def test_generation_without_a_cache_is_counted_with_a_warning(model, caplog):
    """Each pass computes the prompt again, so each is a prompt's; said once, the text unharmed."""
    expected = model.generate(PROMPT, **GREEDY)
    with attach(model, slots=3) as handle, caplog.at_level(logging.WARNING, "melinoe"):
        assert torch.equal(model.generate(PROMPT, **GREEDY, use_cache=False), expected)
        assert handle.counters.forwards.tolist() == [8, 0]
        assert handle.counters.tokens.tolist() == [sum(range(10, 18)), 0]
    said = [record.message for record in caplog.records if "use_cache" in record.message]
    assert len(said) == 1


def test_generation_without_a_cache_is_not_recorded(model):
    """A trace would hold each token as often as it was computed; the refusal names the way out."""
    expected = model.generate(PROMPT, **GREEDY)
    with attach(model, slots=3) as handle:
        with pytest.raises(TraceError, match="use_cache=True"), handle.record():
            model.generate(PROMPT, **GREEDY, use_cache=False)
        with handle.record() as recorder:
            assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        assert recorder.trace().kind.tolist() == [0] * 10 + [1] * 7


def test_guesses_of_the_models_own_first_layer_are_counted_and_not_recorded(model, caplog):
    """The text is right; a trace would hold rows that ran through half of the layers."""
    expected = model.generate(PROMPT, **GREEDY)
    with attach(model, slots=3) as handle:
        assert torch.equal(model.generate(PROMPT, **GREEDY, assistant_early_exit=1), expected)
        assert handle.counters.forwards[1] > 0 and not caplog.records
        with pytest.raises(TraceError, match="assistant_early_exit"), handle.record():
            model.generate(PROMPT, **GREEDY, assistant_early_exit=1)
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)


def test_two_calls_of_the_model_are_two_prompts(model):
    """Outside `generate` nothing says that the second text goes on; it is a sequence of its own."""
    with attach(model, slots=3) as handle, handle.record() as recorder, torch.no_grad():
        model(PROMPT)
        model(torch.cat([PROMPT, PROMPT], dim=1))
    trace = recorder.trace()
    assert (trace.kind == 0).all()
    assert trace.sequence.tolist() == [0] * 10 + [1] * 20


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("given", [True, False])
def test_padding_is_seen_with_a_static_cache(model, own, given):
    """There the model gets a mask of four dimensions, or of a dictionary; rows are as before."""
    options = {"attention_mask": MASK} if given else {}
    _, plain, _ = traced(model, BATCH, **options)
    if own:
        config = GenerationConfig(**GREEDY, cache_implementation="static")
        _, static, _ = traced(model, BATCH, generation_config=config, **options)
    else:
        _, static, _ = traced(model, BATCH, cache_implementation="static", **options)
    assert plain.kind[:12].reshape(3, 4).tolist() == [[2, 2, 0, 0], [0] * 4, [2, 0, 0, 0]]
    assert static.kind.tolist() == plain.kind.tolist()
    assert static.sequence.tolist() == plain.sequence.tolist()


def causal(mask, unmasked):
    """Bool ``(batch, 1, query, key)``; rows that see nothing see all if *unmasked*, as for SDPA."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & mask[:, None, None] > 0
    if unmasked:
        seen |= ~seen.any(-1, keepdim=True)
    return seen


@pytest.mark.parametrize("unmasked", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_read_from_a_mask_of_four_dimensions(model, kind, unmasked, side):
    """Boolean or added to the scores, padding on either side: as with the mask of two."""
    ids, mask = (BATCH, MASK) if side == "left" else (BATCH.flip(1), MASK.flip(1))
    four = causal(mask, unmasked)
    if kind == "float":
        four = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    with attach(model, slots=3) as handle, torch.no_grad():
        with handle.record() as recorder:
            model(ids, attention_mask=four)
        assert recorder.trace().kind.reshape(3, 4).tolist() == (2 * (1 - mask)).tolist()


def test_an_own_generation_config_does_not_compile(model, monkeypatch):
    """Whatever it says; and it is the caller's, so it is left as it was."""
    asked = []
    real = type(model)._valid_auto_compile_criteria

    def asking(self, model_kwargs, generation_config):
        asked.append(generation_config.disable_compile)
        return real(self, model_kwargs, generation_config)

    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", asking)
    config = GenerationConfig(**GREEDY, cache_implementation="static", disable_compile=False)
    expected = model.generate(PROMPT, generation_config=config)
    assert asked and not any(asked)
    with attach(model, slots=3):
        for call in (
            lambda: model.generate(PROMPT, generation_config=config),
            lambda: model.generate(PROMPT, config),
            lambda: model.generate(PROMPT, **GREEDY, disable_compile=False),
            lambda: model.generate(PROMPT, **GREEDY),
        ):
            asked.clear()
            assert torch.equal(call(), expected)
            assert asked and all(asked)
    assert config.disable_compile is False


def test_detaching_leaves_the_models_own_generate(model):
    """The same method of the same class, and its own settings."""
    before = model.generate
    with attach(model, slots=3):
        assert model.generate != before
        assert model.generate.__doc__ == before.__doc__
    assert model.generate == before and "generate" not in vars(model)
    assert model.generation_config.disable_compile is None
