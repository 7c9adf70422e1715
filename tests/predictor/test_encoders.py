"""What reads prompts: the model's own embeddings, or a sentence-transformers model."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from small_olmoe import EXPERTS, LAYERS, PROMPT_TEXT, tiny_model, words_tokenizer

from melinoe import attach
from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW, TraceBuilder
from melinoe.errors import CheckpointError, DependencyError, ModelError
from melinoe.generate import generate
from melinoe.moe.routing import fingerprint
from melinoe.predictor import (
    EmbeddingEncoder,
    Encoder,
    FitSettings,
    Predictor,
    SentenceEncoder,
    compare,
    fit,
)
from melinoe.predictor.encoders import token_embeddings
from melinoe.predictor.fit import _split, fit_shares

QUICK = FitSettings(epochs=40, patience=15)


class Sentences:
    """In place of a sentence-transformers model: one-hot of a text's first word, modulo 4."""

    def __init__(self, name="stub", **options):
        self.name, self.options, self.seen = name, options, []

    def encode(self, texts, *, convert_to_numpy, normalize_embeddings, show_progress_bar):
        assert convert_to_numpy and normalize_embeddings and not show_progress_bar
        self.seen.extend(texts)
        topics = [int(text.split()[0][1:]) % 4 for text in texts]
        return np.eye(4, dtype=np.float32)[topics]


def by_topic(model_fingerprint, sequences=48):
    """Prompts whose first token t uses experts 2 (t % 4) and 2 (t % 4) + 1 of each layer."""
    rng = np.random.default_rng(0)
    builder, prompts = TraceBuilder(LAYERS, EXPERTS, 2), []
    for sequence in range(sequences):
        prompts.append(rng.integers(2, 32, 4).tolist())
        builder.add_forward(rng.integers(0, EXPERTS, (4, LAYERS, 2)), sequence, PROMPT_ROW)
        first = 2 * (prompts[-1][0] % 4)
        for _ in range(6):
            chosen = np.broadcast_to([first, first + 1], (1, LAYERS, 2))
            builder.add_forward(chosen, sequence, COMPLETION_ROW)
    return builder.trace(fingerprint=model_fingerprint), prompts


def test_embeddings_are_pooled_over_all_tokens_and_the_last_eight():
    """Ten tokens of a table whose row i is i: means 4.5 and 5.5."""
    table = torch.arange(10.0)[:, None]
    encoder = EmbeddingEncoder(table)
    assert encoder.features([list(range(10)), [3]]).tolist() == [[4.5, 5.5], [3.0, 3.0]]
    assert isinstance(encoder, Encoder) and encoder.describe()["kind"] == "embeddings"


def test_sentences_are_given_as_text():
    """Ids 3, 4 and padding become "w3 w4"; the numbers that come back are float32."""
    stub = Sentences()
    encoder = SentenceEncoder("stub", words_tokenizer(), stub)
    found = encoder.features([[3, 4, 0], [6]])
    assert stub.seen == ["w3 w4", "w6"]
    assert found.dtype == torch.float32 and found.argmax(1).tolist() == [3, 2]
    assert isinstance(encoder, Encoder)


def test_a_predictor_reads_with_whatever_encoder_it_is_given():
    """The topic is in the text: the stub tells it, and all uses are served."""
    trace, prompts = by_topic("m")
    encoder = SentenceEncoder("stub", words_tokenizer(), Sentences())
    found = compare(trace, prompts, encoder, slots=2, settings=QUICK)
    assert found.recall["learned"].mean > 0.95 and found.winner == "learned"
    predictor = fit(trace, prompts, encoder, slots=2, settings=QUICK)
    assert sorted(predictor.top([5, 9], 2)[0]) == [2, 3]


@pytest.fixture
def library(monkeypatch):
    """A sentence_transformers whose models are stubs; the list of those that were loaded."""
    module, loaded = types.ModuleType("sentence_transformers"), []

    def make(name, **options):
        if name == "absent":
            raise OSError("absent is not a local folder.\nAnd much more.")
        if str(name).endswith(".bin"):  # as the library does where there are no safetensors
            torch.load(name, map_location="cpu", weights_only=False)
        loaded.append(Sentences(name, **options))
        return loaded[-1]

    module.SentenceTransformer = make
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return loaded


def test_a_saved_predictor_loads_its_encoder_again(tmp_path, library):
    """Bound with a tokenizer, by hand and by `generate`; without one it says what is missing."""
    model, tokenizer = tiny_model(), words_tokenizer()
    trace, prompts = by_topic(fingerprint(model))
    encoder = SentenceEncoder.load("some/encoder", tokenizer)
    assert library[0].options["model_kwargs"] == {"use_safetensors": True}
    assert library[0].options["trust_remote_code"] is False
    predictor = fit(trace, prompts, encoder, slots=2, settings=QUICK)
    predictor.save(tmp_path / "predictor")
    header = json.loads((tmp_path / "predictor" / "predictor.json").read_text())
    assert header["encoder"] == {"kind": "sentence-transformers", "name": "some/encoder"}
    again = Predictor.load(tmp_path / "predictor", model, tokenizer)
    assert np.array_equal(again.predict([5, 9]), predictor.predict([5, 9]))
    lazy = Predictor.load(tmp_path / "predictor")
    with pytest.raises(ModelError, match="tokenizer"):
        lazy.bind(model)
    with attach(model, slots=2) as handle:
        generate(model, handle, tokenizer, PROMPT_TEXT, 3, lazy)
    assert [one.name for one in library] == ["some/encoder"] * 3
    assert library[-1].seen == [PROMPT_TEXT]


def test_the_missing_library_is_named(monkeypatch):
    """With the way to install it, and the way without."""
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DependencyError, match=r"melinoe\[predictor\].*own embeddings"):
        SentenceEncoder.load("BAAI/bge-base-en-v1.5", words_tokenizer())


def test_an_encoder_that_cannot_be_loaded_is_named(library):
    """The library's first line, and the way out."""
    with pytest.raises(ModelError, match=r"\(absent is not a local folder\); name a"):
        SentenceEncoder.load("absent", words_tokenizer())


class Trap:
    """What makes a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_an_encoder_with_pickled_weights_is_refused_before_they_are_opened(tmp_path, library):
    """A file that would run code leaves no mark; afterwards `torch.load` is what it was."""
    mark, file, read = tmp_path / "mark", tmp_path / "weights.bin", torch.load
    torch.save(Trap(mark), file)
    with pytest.raises(ModelError, match=r"pickle file.*all safetensors, or use the model's own"):
        SentenceEncoder.load(str(file), words_tokenizer())
    assert not mark.exists() and torch.load is read
    torch.load(file, weights_only=False)
    assert mark.exists()  # the trap works


def test_an_encoder_of_another_width_is_refused():
    """A name that now stands for another model: four numbers were fitted to, five come."""
    model = tiny_model()
    trace, prompts = by_topic(fingerprint(model))
    tokenizer = words_tokenizer()
    predictor = fit(
        trace, prompts, SentenceEncoder("stub", tokenizer, Sentences()), slots=2, settings=QUICK
    )
    predictor.encoder.features = lambda prompts: torch.zeros(len(prompts), 5)
    with pytest.raises(ModelError, match="gives 5 numbers a prompt and the predictor reads 4"):
        predictor.predict([3])


@pytest.mark.parametrize("spec", [None, {}, {"kind": 3}, {"kind": "sentence-transformers"}])
def test_a_header_without_an_encoder_is_refused(tmp_path, spec):
    """It could not be known what to read prompts with."""
    model = tiny_model()
    trace, prompts = by_topic(fingerprint(model))
    place = tmp_path / "predictor"
    fit(trace, prompts, token_embeddings(model), slots=2, settings=QUICK).save(place)
    header = json.loads((place / "predictor.json").read_text())
    (place / "predictor.json").write_text(json.dumps({**header, "encoder": spec}))
    with pytest.raises(CheckpointError, match="fit it again"):
        Predictor.load(place)


def test_an_encoder_of_an_unknown_kind_can_be_given_by_hand(tmp_path):
    """Somebody's own: refused by name at `bind`, used once it is set."""
    model = tiny_model()
    trace, prompts = by_topic(fingerprint(model))

    class Own(EmbeddingEncoder):
        def describe(self):
            return {"kind": "my own"}

    own = Own(token_embeddings(model))
    predictor = fit(trace, prompts, own, slots=2, settings=QUICK)
    predictor.save(tmp_path / "predictor")
    again = Predictor.load(tmp_path / "predictor")
    with pytest.raises(ModelError, match="'my own'"):
        again.bind(model)
    again.encoder = own
    again.bind(model)
    assert np.array_equal(again.predict([4]), predictor.predict([4]))


@pytest.mark.parametrize("seed", range(20))
def test_no_prompt_is_both_learned_from_and_held_out(seed):
    """Equal prompts stay together; the held-out part is at least the share asked for."""
    groups = np.random.default_rng(seed).integers(0, 7, 30)
    learn, stop = _split(groups, 0.2, seed)
    assert sorted([*learn, *stop]) == list(range(30))
    assert not set(groups[learn]) & set(groups[stop])
    assert len(stop) >= 6 or len(set(groups[learn])) == 1
    assert len(learn) >= 1 and len(stop) >= 1


def test_early_stopping_keeps_the_pass_with_the_best_held_out_recall():
    """More passes can only find a better one: held-out recall never falls with the epochs."""
    trace, prompts = by_topic("m", 40)
    table = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    from melinoe.predictor.targets import completion_shares, recall_at

    target, _ = completion_shares(trace, prompts)
    _, stop = _split(np.arange(40), QUICK.held_out, 0)
    recalls = []
    for epochs in (0, 1, 5, 30):
        settings = FitSettings(epochs=epochs, patience=epochs + 1)
        predictor = fit_shares(
            target, list(map(tuple, np.array(prompts))), table, 2, "m", 0, settings
        )
        scores = np.stack([predictor.predict(prompts[index]) for index in stop]).astype(float)
        recalls.append(recall_at(target[stop], scores, 2).mean())
    assert recalls == sorted(recalls) and recalls[-1] > recalls[0] + 0.2


@pytest.mark.parametrize("seed", range(3))
def test_where_fitting_only_harms_the_start_is_kept(seed):
    """Experts that have nothing to do with the prompt: what was held out is served no worse."""
    from melinoe.predictor.targets import recall_at

    rng = np.random.default_rng(seed)
    weights = np.arange(EXPERTS, 0, -1.0) ** 2
    target = rng.dirichlet(weights, (40, LAYERS))
    prompts = rng.integers(2, 32, (40, 4)).tolist()
    table = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    _, stop = _split(np.arange(40), QUICK.held_out, seed)
    found = []
    for epochs in (0, 60):
        settings = FitSettings(epochs=epochs, patience=61, learning_rate=0.05)
        predictor = fit_shares(target, prompts, table, 2, "m", seed, settings)
        scores = np.stack([predictor.predict(prompts[index]) for index in stop]).astype(float)
        found.append(recall_at(target[stop], scores, 2).mean())
    assert found[1] >= found[0]
