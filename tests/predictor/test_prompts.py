"""The prompts of a trace lie beside it."""

import json

import pytest
from trace_builder import TraceBuilder

from melinoe.cache.trace import Trace
from melinoe.errors import DataError
from melinoe.predictor import load_prompts, save_prompts
from melinoe.predictor.prompts import prompts_path


def trace(fingerprint="m") -> Trace:
    return TraceBuilder(1, 2, 1).trace(fingerprint=fingerprint)


def test_prompts_come_back_as_they_were(tmp_path):
    """Beside trace.safetensors lies trace.prompts.json; names with other endings share none."""
    assert prompts_path("a/run.1") != prompts_path("a/run.2")
    path = tmp_path / "trace.safetensors"
    assert save_prompts(path, "m", [[1, 2], [], [3]]) == tmp_path / "trace.prompts.json"
    assert load_prompts(path, trace()) == [[1, 2], [], [3]]
    assert [file.name for file in tmp_path.iterdir()] == ["trace.prompts.json"]


def test_no_prompts_there_is_said(tmp_path):
    """With the way out: trace them again."""
    with pytest.raises(DataError, match="melinoe trace"):
        load_prompts(tmp_path / "trace.safetensors", trace())


@pytest.mark.parametrize(
    "change",
    [{"format": "other"}, {"version": 2}, {"prompts": 3}, {"prompts": [["a"]]}, {"prompts": [[-1]]},
     {"prompts": [[True]]}, None],
)  # fmt: skip
def test_malformed_prompts_are_refused(tmp_path, change):
    """Another format or version, what is no token id, half a file."""
    path = tmp_path / "trace.safetensors"
    file = save_prompts(path, "m", [[1, 2]])
    text = file.read_text()
    file.write_text(json.dumps({**json.loads(text), **change}) if change else text[:30])
    with pytest.raises(DataError, match=r"malformed.*melinoe trace"):
        load_prompts(path, trace())


def test_prompts_of_another_models_trace_are_refused(tmp_path):
    """A trace that was replaced beside its old prompts."""
    path = tmp_path / "trace.safetensors"
    save_prompts(path, "m", [[1, 2]])
    with pytest.raises(DataError, match="another model"):
        load_prompts(path, trace("other"))
