"""A predictor written down: read again the same, refused where it is torn or of another model."""

import json

import numpy as np
import pytest
import torch
from planted_traces import (
    QUICK,
    embeddings,
    planted,
    tiny_model,
)
from safetensors.torch import load_file, save_file

from melinoe.errors import (
    CheckpointError,
    DataError,
    ModelError,
    OutputExistsError,
)
from melinoe.moe.routing import fingerprint
from melinoe.predictor import (
    Predictor,
    fit,
)
from melinoe.predictor.model import token_embeddings


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
