"""The predictor on the command line."""

import json

import pytest
from data_rows import write


@pytest.fixture
def trace(checkpoint, tmp_path, melinoe):
    """Twenty-five prompts, traced; their ids lie beside the trace."""
    data = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": "w5 w6"} for i in range(2, 27)]
    write(data, *rows)
    path = tmp_path / "trace.safetensors"
    code, _, err = melinoe(
        "trace", checkpoint, "--data", data, "--out", path, "--max-new-tokens", 4
    )
    assert code == 0, err
    return path


def refused(result, *words):
    """One sentence at the end of stderr, no traceback, exit 1."""
    code, _, err = result
    assert code == 1 and err.splitlines()[-1].startswith("melinoe: "), err
    assert "Traceback" not in err
    assert all(str(word) in err for word in words), err


def test_a_trace_alone_is_enough_to_fit(trace, tmp_path, melinoe):
    """`melinoe predictor fit TRACE --out DIR`: the trace knows its model and its prompts."""
    code, out, err = melinoe("predictor", "fit", trace, "--out", tmp_path / "p", "--json")
    assert code == 0, err
    assert set(json.loads(out)["recall"]) == {"empty", "popularity", "prefill", "learned"}
    header = json.loads((tmp_path / "p" / "predictor.json").read_text())
    assert header["encoder"]["kind"] == "embeddings" and header["slots"] == 2
    code, out, _ = melinoe("predictor", "fit", trace, "--out", tmp_path / "q")
    assert code == 0 and "ceiling" in out


def test_prompts_that_were_not_kept_are_asked_for(trace, tmp_path, melinoe):
    """With the way to keep them."""
    (tmp_path / "trace.prompts.json").unlink()
    refused(melinoe("predictor", "fit", trace, "--out", tmp_path / "p"), "melinoe trace")


def test_more_slots_than_experts_are_refused(trace, tmp_path, melinoe):
    """Nine of eight."""
    result = melinoe("predictor", "fit", trace, "--slots", 9, "--out", tmp_path / "p")
    refused(result, "1 to 8")
