"""Stored prompts: what they hold, how their file can be bad, and the commands that use them."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from melinoe.cache.trace import Trace
from melinoe.cache.trace_builder import TraceBuilder
from melinoe.cli import app as cli
from melinoe.errors import DataError, TokenizerError, TraceError
from melinoe.prefetch.store import PromptStore, prompt_embedding
from melinoe.shipped import TINY_OLMOE

WEIGHT = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [1.0, 1.0]], dtype=torch.bfloat16)


def traced():
    """Three prompts; the second has no completion. One layer, top-2 of four."""
    builder = TraceBuilder(1, 4, 2)
    builder.add_forward(np.array([[[0, 1]], [[0, 1]]]), 0, 0)
    builder.add_forward(np.array([[[2, 3]]]), 0, 1)
    builder.add_forward(np.array([[[2, -1]]]), 0, 1)
    builder.add_forward(np.array([[[0, 1]]]), 1, 0)
    builder.add_forward(np.array([[[0, 1]]]), 2, 0)
    builder.add_forward(np.array([[[1, 0]]]), 2, 1)
    return builder.trace("m", "f")


def test_a_store_holds_mean_embeddings_and_the_completion_s_uses():
    """By hand: tokens 1 and 2 are (1, 2) in the mean; 2 was used twice, 3 once."""
    store = PromptStore.build(traced(), [[1, 2], [3], [3]], WEIGHT)
    assert store.embeddings.tolist() == [[1.0, 2.0], [1.0, 1.0]]
    assert store.uses.tolist() == [[[0, 0, 2, 1]], [[1, 1, 0, 0]]]
    assert (store.fingerprint, store.model, len(store)) == ("f", "m", 2)


def test_a_saved_store_loads_as_it_was(tmp_path):
    """Arrays, header, and nothing left beside the file."""
    store = PromptStore.build(traced(), [[1, 2], [3], [3]], WEIGHT)
    store.save(tmp_path / "s")
    again = PromptStore.load(tmp_path / "s")
    assert np.array_equal(again.embeddings, store.embeddings)
    assert np.array_equal(again.uses, store.uses)
    assert (again.fingerprint, again.model) == ("f", "m")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_prompts_that_cannot_be_stored_are_refused():
    """Other prompts than the trace's, unknown tokens, no completion at all, an empty prompt."""
    with pytest.raises(TraceError, match="in their order"):
        PromptStore.build(traced(), [[1], [3], [3]], WEIGHT)
    with pytest.raises(TokenizerError, match="own tokenizer"):
        PromptStore.build(traced(), [[1, 9], [3], [3]], WEIGHT)
    with pytest.raises(DataError, match="no prompt of the trace has a completion"):
        PromptStore.build(traced().select([1]), [[3]], WEIGHT)
    with pytest.raises(DataError, match="write a prompt"):
        prompt_embedding(WEIGHT, [])


ARRAYS = {"embeddings": np.zeros((2, 3), np.float32), "uses": np.ones((2, 1, 4), np.uint32)}
HEADER = {"version": 1, "fingerprint": "f", "model": "m"}


@pytest.mark.parametrize(
    ("arrays", "header", "metadata", "words"),
    [
        ({"uses": np.ones((3, 1, 4), np.uint32)}, {}, {}, "2 embeddings and 3"),
        ({"embeddings": np.zeros((2, 3))}, {}, {}, "float32"),
        ({"uses": np.ones((2, 4), np.uint32)}, {}, {}, "3 dimensions"),
        ({"embeddings": np.full((2, 3), np.nan, np.float32)}, {}, {}, "not finite"),
        ({"more": np.zeros(1)}, {}, {}, "other fields"),
        ({}, {"version": 2}, {}, "version 2"),
        ({}, {"model": 3}, {}, "other fields"),
        ({}, {}, {"header": "{"}, "not readable"),
        ({}, {}, {"format": "melinoe-trace"}, "holds no stored prompts"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, arrays, header, metadata, words):
    """Wrong shapes and types, other versions, other files; the sentence says how to make it."""
    path = tmp_path / "s"
    found = {"format": "melinoe-prompt-store", "header": json.dumps(HEADER | header)} | metadata
    path.write_bytes(save(ARRAYS | arrays, metadata=found))
    with pytest.raises(DataError, match=words) as caught:
        PromptStore.load(path)
    assert "prefetch store" in str(caught.value) and str(path) in str(caught.value)


def test_torn_and_missing_files_are_refused(tmp_path):
    """Cut off anywhere, or not there."""
    with pytest.raises(DataError, match="cannot be read"):
        PromptStore.load(tmp_path / "absent")
    path = tmp_path / "s"
    PromptStore.build(traced(), [[1, 2], [3], [3]], WEIGHT).save(path)
    whole = path.read_bytes()
    for share in (0.0, 0.05, 0.6, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match="torn"):
            PromptStore.load(path)


# --- on the command line ------------------------------------------------------------------------


@pytest.fixture
def melinoe(monkeypatch, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["melinoe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three prompts in a file."""
    root = tmp_path_factory.mktemp("prefetch")
    rows = [{"prompt": text, "completion": "x"} for text in ("Two apples", "A river", "Tom has 3")]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_from_a_trace_to_a_store_to_text(melinoe, place):
    """Trace with guesses, store, list, simulate every prefetch, generate by the nearest prompts."""
    trace, store = place / "t.safetensors", place / "s.safetensors"
    code, _, err = melinoe(
        "trace", "tiny", "--data", place / "prompts.jsonl", "--out", trace, "--guesses",
        "--max-new-tokens", 5, "--slots", 8, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert Trace.load(trace).guesses is not None
    assert melinoe("prefetch", "store", trace, "--out", store)[0] == 0
    code, _, err = melinoe("prefetch", "store", trace, "--out", store)
    assert code == 1 and "exists" in err
    code, out, _ = melinoe("prefetch", "list", "--json")
    names = [row["prefetch"] for row in json.loads(out)]
    assert names[:3] == ["none", "popularity", "prefill"] and "nearest" in names

    words = [w for name in ("none", "popularity", "prefill", "next-router", "nearest")
             for w in ("--prefetch", name)]  # fmt: skip
    code, out, err = melinoe(
        "simulate", trace, "--policy", "lru", *words, "--nearest", store, "--json"
    )
    assert code == 0, err
    rows = {row["prefetch"]: row for row in json.loads(out)}
    assert set(rows) == {"none", "popularity", "prefill", "next-router", "nearest"}
    assert rows["none"]["prefetch_precision"] is None
    assert 0 < rows["next-router"]["prefetch_recall"] < 1
    assert 0 < rows["nearest"]["prefetch_precision"] <= 1

    code, out, err = melinoe(
        "generate", "tiny", "Two apples", "--nearest", store, "--slots", 8, "--max-new-tokens", 5,
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert told["prefetch"] == "nearest" and told["prefetch_per_token"] > 0
    size = (TINY_OLMOE / "model.safetensors").stat().st_size
    assert 0 <= told["prefetch_waste_bytes"] < size


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--prefetch", "psychic"), 2, "next-router"),
        (("--prefetch", "nearest"), 1, "prefetch store"),
        (("--prefetch", "prefill", "--prefetch-at", "prompt"), 1, "moment of its own"),
        (("--prefetch", "popularity", "--prefetch-at", "never"), 2, "completion"),
        (("--prefetch", "prefill", "--nearest", "s.safetensors"), 2, "--prefetch nearest"),
        (("--nearest", "absent.safetensors"), 1, "cannot be read"),
        (("--nearest", "s", "--predictor", "p"), 2, "name one of"),
        (("--prefetch", "prefill", "--prior", "p"), 2, "for --prior"),
        (("--prefetch", "popularity", "--prior", "p"), 2, "for --prior"),
        (("--prefetch", "prefill", "--predictor", "p"), 2, "for --predictor"),
        (("--nearest", "s", "--prior", "p"), 2, "name one of predictor, nearest"),
    ],
)
def test_bad_words_are_refused_before_a_model_is_read(more, code, words, melinoe):
    """Unknown names and moments, files for another prefetch, files that are not there."""
    found, out, err = melinoe("generate", "nowhere", "w3", *more)
    assert (found, out) == (code, "")
    assert words in err
