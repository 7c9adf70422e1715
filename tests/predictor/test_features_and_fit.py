"""Prompts read with the model's embeddings, and what fitting keeps apart and keeps."""

import json

import numpy as np
import pytest
import torch
from small_olmoe import EXPERTS, LAYERS, tiny_model
from trace_builder import TraceBuilder

from melinoe.cache.trace import COMPLETION_ROW, PROMPT_ROW
from melinoe.errors import CheckpointError
from melinoe.moe.routing import fingerprint
from melinoe.predictor import FitSettings, Predictor, fit
from melinoe.predictor.fit import _split, fit_shares
from melinoe.predictor.model import features_of, token_embeddings

QUICK = FitSettings(epochs=40, patience=15)


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
    assert features_of(table, [list(range(10)), [3]]).tolist() == [[4.5, 5.5], [3.0, 3.0]]


@pytest.mark.parametrize("spec", [None, {}, {"kind": 3}, {"kind": "sentence-transformers"}])
def test_a_header_that_reads_prompts_with_something_else_is_refused(tmp_path, spec):
    """Nothing, or a second model, which an earlier version could use."""
    model = tiny_model()
    trace, prompts = by_topic(fingerprint(model))
    place = tmp_path / "predictor"
    fit(trace, prompts, token_embeddings(model), slots=2, settings=QUICK).save(place)
    header = json.loads((place / "predictor.json").read_text())
    (place / "predictor.json").write_text(json.dumps({**header, "encoder": spec}))
    with pytest.raises(CheckpointError, match="fit it again"):
        Predictor.load(place)


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
    from melinoe.predictor.fit import completion_shares, recall_at

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
    from melinoe.predictor.fit import recall_at

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
