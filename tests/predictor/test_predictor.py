"""The predictor learns what a prompt says about its experts, and is judged on unseen prompts."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from melinoe.cache.simulator import simulate
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, Trace
from melinoe.cache.trace_builder import TraceBuilder
from melinoe.errors import (
    CheckpointError,
    DataError,
    ModelError,
    OutputExistsError,
    TokenizerError,
    TraceError,
)
from melinoe.moe.routing import fingerprint
from melinoe.predictor import (
    Comparison,
    FitSettings,
    Predictor,
    compare,
    fit,
    recall_at,
    use_counts,
)
from melinoe.predictor.encoders import token_embeddings
from melinoe.predictor.fit import fit_shares
from melinoe.stats import bootstrap, paired_difference

LAYERS, EXPERTS, TOP_K, VOCABULARY = 2, 16, 2, 32
QUICK = FitSettings(epochs=60, patience=20)


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            pad_token_id=0,
            eos_token_id=1,
        )
    ).eval()


def planted(sequences=60, seed=0, model_fingerprint="m"):
    """Prompts that start with token 2 + t use experts 4t..4t+3; their own rows are noise."""
    rng = np.random.default_rng(seed)
    builder = TraceBuilder(LAYERS, EXPERTS, TOP_K)
    prompts = []
    for sequence in range(sequences):
        topic = sequence % 4
        prompts.append([2 + topic, 2 + topic, *rng.integers(8, VOCABULARY, 4).tolist()])
        noise = rng.integers(0, EXPERTS, (6, LAYERS, TOP_K))
        builder.add_forward(noise, sequence, PROMPT_ROW)
        for _ in range(12):
            chosen = np.stack([rng.permutation(4)[:TOP_K] for _ in range(LAYERS)]) + 4 * topic
            builder.add_forward(chosen[None], sequence, COMPLETION_ROW)
    return builder.trace(model="planted", fingerprint=model_fingerprint), prompts


def embeddings(seed=0):
    return torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(seed))


def test_uses_are_counted_by_sequence_layer_and_kind():
    """Two completion rows of one layer choose (0, 1) and (1, none): expert 1 twice, 0 once."""
    trace = Trace(
        experts=np.asarray([[[2, 2]], [[0, 1]], [[1, -1]]], np.int16),
        forward=np.asarray([0, 1, 2], np.int32),
        sequence=np.zeros(3, np.int32),
        kind=np.asarray([PROMPT_ROW, COMPLETION_ROW, COMPLETION_ROW], np.uint8),
        num_experts=3,
    )
    assert use_counts(trace, COMPLETION_ROW).tolist() == [[[1, 2, 0]]]
    assert use_counts(trace, PROMPT_ROW).tolist() == [[[0, 0, 2]]]


def test_recall_is_the_share_of_uses_that_the_guess_would_have_served():
    """Layer 0 guesses experts 2, 0 of shares .5 .3 .2; layer 1 guesses 1, 2 of .1 .1 .8."""
    target = np.asarray([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]])
    scores = np.asarray([[2.0, 1.0, 3.0], [0.0, 2.0, 1.0]])
    assert recall_at(target, scores, 2) == pytest.approx([(0.7 + 0.9) / 2])


def test_a_planted_mapping_is_learned_and_popularity_is_not_enough():
    """Four topics of four experts, four slots: who knows the topic serves all, else a quarter."""
    trace, prompts = planted()
    comparison = compare(trace, prompts, embeddings(), slots=4, settings=QUICK)
    assert comparison.recall["learned"].mean > 0.97
    assert comparison.recall["popularity"].mean < 0.45
    assert comparison.recall["empty"].mean == 0
    assert comparison.ceiling.mean == pytest.approx(1)
    assert comparison.winner == "learned"


def test_loading_the_right_experts_ahead_saves_what_it_costs_and_no_more():
    """
    Four topics of four experts, four slots, six random prompt tokens before.

    The planted experts are all used by nearly every completion: named ahead they are loaded once,
    as they would have been on demand, so the loads of a perfect guess are those of no guess, and
    whatever a guess names wrongly is paid on top.
    """
    trace, prompts = planted()
    found = compare(trace, prompts, embeddings(), slots=4, settings=QUICK)
    empty, right = found.transfers["empty"].mean, found.transfers["learned"].mean
    assert right == pytest.approx(empty, abs=0.05)
    assert found.transfers["popularity"].mean > empty + 0.3
    assert found.saved["popularity"].high < 0
    assert found.winner == "learned"
    record = found.to_record("tiny")
    assert record["prefetch"] == found.prefetch and set(record["saved"]) == {
        "popularity",
        "prefill",
        "learned",
    }


def test_a_prefetch_that_saves_is_recommended():
    """Twenty loads of an empty start against ten, whole interval above 0; against thirty, not."""
    recall = {name: bootstrap([0.5, 0.5]) for name in ("empty", "popularity", "prefill")}
    recall["learned"] = bootstrap([0.9, 0.9])
    for ours, wanted in ((10.0, "learned"), (20.0, "none"), (30.0, "none")):
        saved = {"learned": paired_difference([20.0, 20.0], [ours, ours])}
        one = Comparison(4, recall, bootstrap([1.0, 1.0]), bootstrap([0.4, 0.4]), {}, saved)
        assert one.winner == "learned" and one.prefetch == wanted


def test_transfers_are_those_of_the_simulator():
    """Popularity of the other folds, written out: loads and prefetch loads over tokens."""
    trace, prompts = planted(20)
    found = compare(trace, prompts, embeddings(), slots=4, settings=QUICK, folds=2)
    plain = simulate(trace, 4, "lru", reset_between_sequences=True).counters
    assert found.transfers["empty"].mean == pytest.approx(plain.transfers_per_token())
    assert found.transfers["popularity"].mean > plain.transfers_per_token()


def test_the_prefills_experts_win_where_they_tell_and_tokens_do_not():
    """Prompts of random tokens whose own rows show the experts to come: a free rival is chosen."""
    rng = np.random.default_rng(0)
    builder, prompts = TraceBuilder(LAYERS, EXPERTS, TOP_K), []
    for sequence in range(40):
        favourites = rng.permutation(EXPERTS)[:4]
        prompts.append(rng.integers(2, VOCABULARY, 5).tolist())
        for rows, kind in ((5, PROMPT_ROW), (10, COMPLETION_ROW)):
            chosen = rng.choice(favourites, (rows, LAYERS, TOP_K))
            builder.add_forward(chosen, sequence, kind)
    comparison = compare(builder.trace(), prompts, embeddings(), slots=4, settings=QUICK)
    assert comparison.recall["prefill"].mean > 0.9
    assert comparison.recall["learned"].mean < 0.5
    assert comparison.winner == "prefill"


def test_where_prompts_say_nothing_the_learned_predictor_does_not_win():
    """Completions of the same distribution whatever the prompt: no gain, so a rival is chosen."""
    rng = np.random.default_rng(1)
    builder, prompts = TraceBuilder(LAYERS, EXPERTS, TOP_K), []
    likely = np.asarray([0.2] * 4 + [0.2 / 12] * 12)
    for sequence in range(40):
        prompts.append(rng.integers(2, VOCABULARY, 5).tolist())
        for rows, kind in ((5, PROMPT_ROW), (10, COMPLETION_ROW)):
            chosen = rng.choice(EXPERTS, (rows, LAYERS, TOP_K), p=likely)
            builder.add_forward(chosen, sequence, kind)
    comparison = compare(builder.trace(), prompts, embeddings(), slots=4, settings=QUICK)
    assert comparison.winner != "learned"
    assert comparison.recall["learned"].mean == pytest.approx(
        comparison.recall["popularity"].mean, abs=0.03
    )


def test_two_hundred_sequences_are_fitted_in_seconds():
    """The stage is no reason to skip it: under five seconds on one core."""
    trace, prompts = planted(200)
    start = time.perf_counter()
    fit(trace, prompts, embeddings(), slots=4)
    assert time.perf_counter() - start < 5


def test_predictions_are_distributions_and_top_lists_the_likeliest_first():
    """Each layer sums to 1; the planted topic's four experts come out as the top four."""
    trace, prompts = planted()
    predictor = fit(trace, prompts, embeddings(), slots=4, settings=QUICK)
    found = predictor.predict(prompts[1])
    assert found.shape == (LAYERS, EXPERTS) and found.dtype == np.float32
    assert found.sum(-1) == pytest.approx([1, 1], abs=1e-5)
    for layer, ids in enumerate(predictor.top(prompts[1])):
        assert set(ids) == {4, 5, 6, 7}
        assert sorted(ids, key=lambda e: -found[layer, e]) == ids
    assert [len(ids) for ids in predictor.top(prompts[1], 3)] == [3, 3]


def test_an_empty_prompt_gets_the_popularity():
    """Nothing to read, so the mean over the fitted prompts, which sums to 1."""
    trace, prompts = planted()
    predictor = fit(trace, prompts, embeddings(), slots=4, settings=QUICK)
    assert np.array_equal(predictor.predict([]), predictor.popularity)
    assert predictor.predict([]).sum(-1) == pytest.approx([1, 1], abs=1e-5)


def test_equal_seeds_give_equal_predictors_and_leave_the_global_seed_alone():
    """Fitting twice gives bit-equal predictions, and torch's own generator does not move."""
    trace, prompts = planted(20)
    state = torch.random.get_rng_state()
    first = fit(trace, prompts, embeddings(), slots=4, seed=3, settings=QUICK)
    second = fit(trace, prompts, embeddings(), slots=4, seed=3, settings=QUICK)
    other = fit(trace, prompts, embeddings(), slots=4, seed=4, settings=QUICK)
    assert np.array_equal(first.predict(prompts[0]), second.predict(prompts[0]))
    assert not np.array_equal(first.predict(prompts[0]), other.predict(prompts[0]))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_saved_predictor_predicts_the_same(tmp_path):
    """Save and load give the same numbers, with the comparison beside them."""
    model = tiny_model()
    trace, prompts = planted(model_fingerprint=fingerprint(model))
    predictor = fit(trace, prompts, token_embeddings(model), slots=4, settings=QUICK)
    predictor.comparison = {"winner": "learned"}
    predictor.save(tmp_path / "predictor")
    again = Predictor.load(tmp_path / "predictor")
    with pytest.raises(ModelError, match="bind"):
        again.predict(prompts[2])
    again.bind(model)
    assert np.array_equal(again.predict(prompts[2]), predictor.predict(prompts[2]))
    assert np.array_equal(again.predict([]), predictor.predict([]))
    assert again.slots == 4 and again.comparison == {"winner": "learned"}
    assert [path.name for path in tmp_path.iterdir()] == ["predictor"]


def test_another_model_may_not_use_it(tmp_path):
    """The same shapes with other weights are another model, named as such."""
    model = tiny_model()
    trace, prompts = planted(model_fingerprint=fingerprint(model))
    predictor = fit(trace, prompts, token_embeddings(model), slots=4, settings=QUICK)
    predictor.save(tmp_path / "predictor")
    with pytest.raises(ModelError, match="fitted to model"):
        Predictor.load(tmp_path / "predictor", tiny_model(seed=1))


def test_a_taken_place_is_left_alone(tmp_path):
    """Saving over files of someone else is refused."""
    trace, prompts = planted(20)
    predictor = fit(trace, prompts, embeddings(), slots=4, settings=QUICK)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        predictor.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("damage", ["header", "weights", "shape", "format", "key"])
def test_a_torn_predictor_is_refused(tmp_path, damage):
    """Cut files, missing tensors and later formats each get one sentence."""
    model = tiny_model()
    trace, prompts = planted(20, model_fingerprint=fingerprint(model))
    place = tmp_path / "predictor"
    fit(trace, prompts, token_embeddings(model), slots=4, settings=QUICK).save(place)
    header, weights = place / "predictor.json", place / "predictor.safetensors"
    if damage == "header":
        header.write_text(header.read_text()[:20])
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "shape":
        save_file({**load_file(weights), "output.bias": torch.zeros(3)}, weights)
    else:
        found = json.loads(header.read_text())
        found.update({"format": 99}) if damage == "format" else found.pop("slots")
        header.write_text(json.dumps(found))
    with pytest.raises(CheckpointError):
        Predictor.load(place, model)


def test_no_predictor_there_is_said(tmp_path):
    """An empty folder holds no predictor, and the sentence says how to make one."""
    with pytest.raises(DataError, match="melinoe predictor fit"):
        Predictor.load(tmp_path, tiny_model())


def test_prompts_that_are_not_the_traces_are_refused():
    """One prompt too few, and one of another length, each show that they belong elsewhere."""
    trace, prompts = planted(20)
    with pytest.raises(TraceError, match="20 sequences but 19"):
        fit(trace, prompts[:-1], embeddings(), slots=4)
    with pytest.raises(TraceError, match="sequence 3"):
        fit(trace, [*prompts[:3], prompts[3][:-1], *prompts[4:]], embeddings(), slots=4)


def test_too_few_prompts_are_refused():
    """Nine prompts teach nothing that could be checked."""
    trace, prompts = planted(9)
    with pytest.raises(DataError, match="at least 10"):
        fit(trace, prompts, embeddings(), slots=4)


def test_a_sequence_without_completion_teaches_nothing():
    """Shares of a sequence that ended at once are all zero, and it is left out of the fit."""
    target = np.full((11, LAYERS, EXPERTS), 1 / EXPERTS)
    target[5] = 0
    prompts = [[2, 3]] * 11
    predictor = fit_shares(target, prompts, embeddings(), 4, "m", settings=QUICK)
    assert predictor.popularity == pytest.approx(np.full((LAYERS, EXPERTS), 1 / EXPERTS))


def test_ids_beyond_the_vocabulary_name_the_tokenizer():
    """Token 32 of a vocabulary of 32 comes from another tokenizer."""
    trace, prompts = planted(20)
    predictor = fit(trace, prompts, embeddings(), slots=4, settings=QUICK)
    with pytest.raises(TokenizerError, match="token id 32"):
        predictor.predict([3, 32])


@pytest.mark.parametrize("slots", [0, EXPERTS + 1])
def test_slots_outside_the_layer_are_the_callers_mistake(slots):
    """A cache holds between one expert and all of them."""
    trace, prompts = planted(20)
    with pytest.raises(ValueError, match="slots"):
        fit(trace, prompts, embeddings(), slots=slots)
