"""Generation on few slots: the plain model's tokens, its cost, the prefetch after the prompt."""

import numpy as np
import pytest
import torch
from small_olmoe import EXPERTS, LAYERS, PROMPT_TEXT, TOP_K, always, tiny_model, words_tokenizer
from transformers import TextStreamer

from melinoe import attach
from melinoe.cache.counters import COMPLETION, PROMPT
from melinoe.cache.prefetch import Listed, Predicted
from melinoe.cache.simulator import simulate
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW
from melinoe.errors import AttachError, DataError, ModelError, TokenizerError
from melinoe.generate import generate, prompt_ids, trace_prompts
from melinoe.moe.routing import fingerprint


def test_few_slots_give_the_plain_models_tokens():
    """Greedy ids on three slots of eight are those that transformers makes without us."""
    model, tokenizer = tiny_model(), words_tokenizer()
    plain = model.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=9, do_sample=False)
    with attach(model, slots=3) as handle:
        answer = generate(model, handle, tokenizer, PROMPT_TEXT, 9)
    assert answer.ids == plain[0, 4:].tolist()
    assert answer.text == tokenizer.decode(answer.ids, skip_special_tokens=True)
    assert answer.prompt_ids == [3, 4, 5, 6]
    assert generate(model, None, tokenizer, [3, 4, 5, 6], 9).ids == answer.ids


def test_the_context_bounds_what_is_written(caplog):
    """Of ten tokens a prompt of 4 leaves 6; one of 12 leaves none, and what follows is doubted."""
    model, tokenizer = tiny_model(), words_tokenizer()
    model.config.max_position_embeddings = 10
    assert len(generate(model, None, tokenizer, PROMPT_TEXT, 10**12).ids) == 6
    assert not caplog.records
    assert len(generate(model, None, tokenizer, [3, 4, 5, 6] * 3, 2).ids) == 2
    assert "12 tokens and the model's context is 10" in caplog.text


def test_the_coldest_temperatures_take_the_likeliest_token():
    """Logits over 1e-300 are beyond float32; 0 is no temperature for transformers."""
    model, tokenizer = tiny_model(), words_tokenizer()
    greedy = generate(model, None, tokenizer, PROMPT_TEXT, 9).ids
    for heat in (0.0, 1e-300, 1e-6):
        cold = generate(model, None, tokenizer, PROMPT_TEXT, 9, do_sample=True, temperature=heat)
        assert cold.ids == greedy


@pytest.mark.filterwarnings("ignore")  # what transformers thinks of the settings
@pytest.mark.parametrize(
    "own",
    [
        {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": True}, {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1}, {"min_new_tokens": 20}, {"stop_strings": ["w1"]},
        {"max_time": 1e-9}, {"suppress_tokens": [13]}, {"forced_eos_token_id": 1},
        {"do_sample": True, "temperature": 0.5, "top_k": 3}, {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 2.0}, {"max_length": 3}, {"bad_words_ids": [[13]]},
    ],
    ids=lambda own: next(iter(own)),
)  # fmt: skip
def test_a_checkpoints_own_settings_change_no_greedy_text(own):
    """As many tokens, and the same, as without; each pass is of one token."""
    model, tokenizer = tiny_model(), words_tokenizer()
    plain = generate(model, None, tokenizer, PROMPT_TEXT, 9).ids
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    with attach(model, slots=3) as handle:
        assert generate(model, handle, tokenizer, PROMPT_TEXT, 9).ids == plain
        assert handle.counters.tokens.tolist() == [4, 8]


def test_counts_are_of_this_call_alone():
    """Two calls count 1 prompt pass of 4 tokens and 4 single ones each, not the sum of both."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle:
        for _ in range(2):
            counters = generate(model, handle, tokenizer, PROMPT_TEXT, 5).counters
            assert counters.tokens.tolist() == [4, 4]
            assert counters.forwards.tolist() == [1, 4]
            assert counters.uses[PROMPT].tolist() == [4 * TOP_K] * LAYERS
            assert counters.uses[COMPLETION].tolist() == [4 * TOP_K] * LAYERS
        assert handle.counters.forwards.tolist() == [2, 8]


def test_times_add_up():
    """The time to the first token is part of the whole."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle:
        one = generate(
            model, handle, tokenizer, PROMPT_TEXT, 5, prefetch=Predicted(always(model, [1, 2]))
        )
    assert 0 < one.ttft_s < one.seconds
    assert one.tokens_per_s == pytest.approx(5 / one.seconds)
    assert 0 <= one.stall_s < one.seconds - one.ttft_s


def test_a_prefetch_for_the_completion_comes_after_the_prompts_forward_pass():
    """The prompt's pass starts with empty slots, the second one with the experts named."""
    model, tokenizer = tiny_model(), words_tokenizer()
    seen = []
    with attach(model, slots=3) as handle:
        first = model.model.layers[0]
        hook = first.register_forward_pre_hook(lambda *_: seen.append(handle.resident()))
        predictor = Predicted(always(model, [6, 1, 4]))
        one = generate(model, handle, tokenizer, PROMPT_TEXT, 2, prefetch=predictor)
        hook.remove()
    assert seen == [[[], []], [[1, 4, 6]] * LAYERS]
    assert one.counters.loads[PROMPT].sum() > 0


def test_experts_that_are_resident_are_not_prefetched_again():
    """With all eight slots filled by a first call, a second prefetch loads nothing."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=EXPERTS) as handle:
        handle.prefetch([list(range(EXPERTS))] * LAYERS)
        handle.reset_counters()
        named = Predicted(always(model, [6, 1]))
        one = generate(model, handle, tokenizer, PROMPT_TEXT, 3, prefetch=named)
    assert one.counters.prefetch_loads.sum() == 0 and one.counters.loads.sum() == 0


def test_a_trace_has_a_sequence_per_prompt():
    """Three prompts of 4, 2 and 3 tokens, five new ones each: 4 of those were computed on."""
    model, tokenizer = tiny_model(), words_tokenizer()
    prompts, said = [PROMPT_TEXT, "w7 w8", [9, 10, 11]], []
    with attach(model, slots=3) as handle:
        trace = trace_prompts(model, handle, tokenizer, prompts, 5, progress=said.append)
    assert trace.num_sequences == 3 and trace.fingerprint == fingerprint(model)
    for sequence, length in enumerate([4, 2, 3]):
        rows = trace.sequence == sequence
        assert (rows & (trace.kind == PROMPT_ROW)).sum() == length
        assert (rows & (trace.kind == COMPLETION_ROW)).sum() == 4
    assert said[-1] == "traced 3 of 3 prompts"


def test_a_trace_does_not_depend_on_the_slots():
    """One slot and eight record the same choices."""
    tokenizer, traces = words_tokenizer(), []
    for slots in (1, EXPERTS):
        model = tiny_model()
        with attach(model, slots=slots) as handle:
            traces.append(trace_prompts(model, handle, tokenizer, [PROMPT_TEXT, "w9 w8"], 6))
    assert np.array_equal(traces[0].experts, traces[1].experts)


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_a_prefetch_for_the_completion_counts_as_simulated(tokens):
    """Three prompts, also of one new token, which has no completion to prefetch for."""
    model, tokenizer = tiny_model(), words_tokenizer()
    prompts, wanted = [PROMPT_TEXT, "w7 w8 w9", "w20"], [6, 1, 4]
    with attach(model, slots=3) as handle:
        predictor = Predicted(always(model, wanted))
        with handle.record() as recorder:
            for prompt in prompts:
                generate(model, handle, tokenizer, prompt, tokens, prefetch=predictor)
            model.generate(torch.tensor([[7, 8]]), max_new_tokens=4, do_sample=False)
        counted, trace = handle.counters, recorder.trace()
    ahead = {sequence: [wanted] * LAYERS for sequence in range(3)}  # not for the last prompt
    simulated = simulate(trace, 3, prefetch=Listed(ahead)).counters
    assert simulated == counted
    assert (counted.prefetch_loads.sum() > 0) == (tokens > 1)


def test_sampling_and_streaming_are_transformers_own(capsys):
    """Equal seeds give equal samples; a streamer prints the text as it comes."""
    model, tokenizer = tiny_model(), words_tokenizer()
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    with attach(model, slots=3) as handle:
        torch.manual_seed(1)
        first = generate(model, handle, tokenizer, PROMPT_TEXT, 12, **options)
        torch.manual_seed(1)
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        again = generate(model, handle, tokenizer, PROMPT_TEXT, 12, streamer=streamer, **options)
        greedy = generate(model, handle, tokenizer, PROMPT_TEXT, 12)
    assert first.ids == again.ids != greedy.ids
    assert capsys.readouterr().out.split() == tokenizer.decode(again.ids).split()


def test_greedy_stays_greedy_whatever_the_checkpoint_says():
    """A checkpoint that asks for sampling by default is not sampled from unless told."""
    model, tokenizer = tiny_model(), words_tokenizer()
    before = generate(model, None, tokenizer, PROMPT_TEXT, 12)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=7, top_p=0.9)
    assert generate(model, None, tokenizer, PROMPT_TEXT, 12).ids == before.ids


def test_generation_ends_with_end_of_text():
    """The first greedy token declared end-of-text: one id, and no text."""
    model, tokenizer = tiny_model(), words_tokenizer()
    first = generate(model, None, tokenizer, PROMPT_TEXT, 12).ids[0]
    assert generate(model, None, tokenizer, PROMPT_TEXT, 12, eos_token_id=first).ids == [first]


def test_an_empty_prompt_is_refused():
    """No tokens, nothing to condition on; also in a list of prompts, and an empty list."""
    model, tokenizer = tiny_model(), words_tokenizer()
    with attach(model, slots=3) as handle:
        with pytest.raises(DataError, match="prompt is empty"):
            generate(model, handle, tokenizer, "")
        with pytest.raises(DataError, match="at least one"):
            trace_prompts(model, handle, tokenizer, [])
    assert prompt_ids(tokenizer, "w2 w3") == [2, 3]


def test_ids_of_another_tokenizer_are_refused():
    """Token 40 of a model that knows 32."""
    with pytest.raises(TokenizerError, match="token id 40"):
        generate(tiny_model(), None, words_tokenizer(), [3, 40])


def test_a_predictor_of_another_model_is_refused():
    """Equal shapes, other routers; nothing has been prefetched."""
    model, other = tiny_model(), tiny_model(seed=1)
    with attach(model, slots=3) as handle:
        with pytest.raises(ModelError, match="fitted to model"):
            named = Predicted(always(other, [1]))
            generate(model, handle, words_tokenizer(), PROMPT_TEXT, 2, prefetch=named)
        assert handle.counters.prefetch_loads.sum() == 0


def test_a_predictor_without_the_runtime_is_refused():
    """A plain model has no slots to prefetch into."""
    model = tiny_model()
    with pytest.raises(AttachError, match="load through"):
        named = Predicted(always(model, [1]))
        generate(model, None, words_tokenizer(), PROMPT_TEXT, 2, prefetch=named)


def test_no_tokens_to_generate_is_the_callers_mistake():
    """Zero new tokens is no generation."""
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(tiny_model(), None, words_tokenizer(), PROMPT_TEXT, 0)
