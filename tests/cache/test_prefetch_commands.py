"""Prefetches on the command line: recorded, simulated, served, and words refused."""

import json

import pytest
from data_rows import write


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three prompts in a file."""
    root = tmp_path_factory.mktemp("prefetch")
    rows = [{"prompt": text, "completion": "x"} for text in ("Two apples", "A river", "Tom has 3")]
    write(root / "prompts.jsonl", *rows)
    return root


def test_from_a_trace_to_text(melinoe, place):
    """Trace, simulate every prefetch, generate by what the trace used most."""
    trace = place / "t.safetensors"
    code, _, err = melinoe(
        "trace", "tiny", "--data", place / "prompts.jsonl", "--out", trace,
        "--max-new-tokens", 5, "--slots", 8, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err

    tried = ("none", "popularity", "prefill")
    words = [word for name in tried for word in ("--prefetch", name)]
    code, out, err = melinoe("simulate", trace, "--policy", "lru", *words, "--json")
    assert code == 0, err
    rows = {row["prefetch"]: row for row in json.loads(out)}
    assert set(rows) == set(tried)
    assert rows["none"]["prefetch_per_token"] == 0 < rows["popularity"]["prefetch_per_token"]

    code, out, err = melinoe(
        "generate", "tiny", "Two apples", "--popularity", trace, "--slots", 8, "--max-new-tokens",
        5, "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert told["prefetch"] == "popularity" and told["prefetch_per_token"] > 0


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--prefetch", "psychic"), 2, "predictor"),
        (("--prefetch", "popularity"), 1, "--popularity"),
        (("--prefetch", "prefill", "--popularity", "t"), 2, "--prefetch popularity"),
        (("--popularity", "absent.safetensors"), 1, "cannot be read"),
        (("--popularity", "t", "--predictor", "p"), 2, "name one of"),
        (("--prefetch", "prefill", "--predictor", "p"), 2, "for --predictor"),
    ],
)
def test_bad_words_are_refused_before_a_model_is_read(more, code, words, melinoe):
    """Unknown names, files for another prefetch, files that are not there."""
    found, out, err = melinoe("generate", "nowhere", "w3", *more)
    assert (found, out) == (code, "")
    assert words in err
