"""Three random models that stand for a base, its fine-tuned self and its control."""

import shutil

import pytest
from small_olmoe import tiny_model, words_tokenizer
from three_models import SEEDS, SETTINGS, texts

from melinoe.checkpoint import write_metadata
from melinoe.moe.routing import fingerprint
from melinoe.outcome import record_origin, record_outcome


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A base and two other random models, one fine-tuned by its record, one its control."""
    root = tmp_path_factory.mktemp("models")
    fingerprints = {}
    for name, seed in SEEDS.items():
        model = tiny_model(seed)
        model.save_pretrained(root / name)
        fingerprints[name] = fingerprint(model)
        words_tokenizer().save_pretrained(root / name)
    (root / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    log = [
        {"step": 0, "eval_nll": 3.4, "eval_cache": 1.5},
        {"step": 1, "nll": 3.5, "cache": 1.6},
        {"step": 10, "nll": 2.9, "cache": 0.9},
        {"step": 10, "eval_nll": 3.0, "eval_cache": 1.0},
    ]
    settings = {"capacity": 0.25, "lambda_cache": 0.5, "lambda_rank": 0.1, "seed": 3}
    write_metadata(root / "tuned", {"settings": settings, "log": log})
    off = {"lambda_cache": 0.0}
    plain = {"settings": settings | off, "fingerprint": fingerprints["control"]}
    write_metadata(root / "control", plain)
    return root


@pytest.fixture(scope="session")
def tuned(checkpoints):
    """The tuned model with its origin and outcome recorded."""
    data = checkpoints / "train.jsonl"
    data.write_text('{"text": "w3 w4"}\n')
    path = checkpoints / "tuned"
    record_origin(path, checkpoints / "base", data, texts(count=1))
    record_outcome(path, checkpoints / "base", {"words": texts()}, {"far": texts(20, 4)},
                   settings=SETTINGS)  # fmt: skip
    return path


@pytest.fixture(scope="session")
def beside_control(checkpoints, tuned, tmp_path_factory):
    """The same checkpoint, measured beside its control too."""
    path = tmp_path_factory.mktemp("measured") / "tuned"
    shutil.copytree(tuned, path)
    record_outcome(path, checkpoints / "base", {"words": texts()}, {"far": texts(20, 4)},
                   control=checkpoints / "control", settings=SETTINGS)  # fmt: skip
    return path


@pytest.fixture
def copy(tuned, tmp_path):
    """The tuned checkpoint's melinoe.json in a directory of its own."""
    path = tmp_path / "my-model"
    path.mkdir()
    shutil.copy(tuned / "melinoe.json", path)
    return path


@pytest.fixture
def words_alone(monkeypatch):
    """Cards without figures, of which each takes longer to draw than the words to write."""
    monkeypatch.setattr("melinoe.report.card.figures_of", lambda records: [])
