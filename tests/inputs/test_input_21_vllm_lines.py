"""Lines that vLLM's loggers write: layer, token_idx, topk_ids, topk_weights."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from melinoe.cache.trace import Trace
from melinoe.cli.app import app
from melinoe.errors import TraceError
from melinoe.foreign import read_foreign

META = {"type": "meta", "model_id": "org/moe", "layers_logged": [0, 1], "num_experts": 8}


def one_pass(*tokens, layers=2, **more):
    """Lines of one forward pass, layer by layer; *tokens* say where their two experts begin."""
    return [
        {
            "type": "route",
            "token_idx": index,
            "layer": layer,
            "topk_ids": [(token + layer) % 8, (token + layer + 3) % 8],
            "topk_weights": [0.5, 0.25],
            **more,
        }
        for layer in range(layers)
        for index, token in enumerate(tokens)
    ]


WARM_UP = one_pass(*[7] * 20)
FIRST = [*one_pass(1, 2, 3), *one_pass(4), *one_pass(5)]
SECOND = [*one_pass(2, 2), *one_pass(6)]


def written(path, *lines):
    text = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_lines_of_one_request_at_a_time_are_a_trace(tmp_path, name):
    """A pass begins where numbers do; several tokens are a prompt; the warm-up is left out."""
    found = read_foreign(written(tmp_path / name, META, *WARM_UP, *FIRST, *SECOND))
    trace = found.trace
    assert trace.kind.tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    assert trace.sequence.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert trace.forward.tolist() == [0, 0, 0, 1, 2, 3, 3, 4]
    assert trace.experts[:, 0, 0].tolist() == [1, 2, 3, 4, 5, 2, 2, 6]
    assert trace.experts[:, 1, 1].tolist() == [5, 6, 7, 0, 1, 6, 6, 2]
    assert (trace.num_experts, trace.model) == (8, "org/moe")
    assert any("first 20 tokens" in note for note in found.notes)


def test_a_log_of_one_layer_is_a_trace_of_one(tmp_path):
    """Most of these loggers record a single layer, whatever its number."""
    lines = [line | {"layer": 12} for line in one_pass(1, 2, layers=1) + one_pass(3, layers=1)]
    trace = read_foreign(written(tmp_path / "t.jsonl", *lines), num_experts=8).trace
    assert trace.num_layers == 1 and trace.kind.tolist() == [0, 0, 1]


def test_requests_that_are_named_are_taken_apart(tmp_path):
    """Two prompts read together, then decoded together: each token is its request's."""
    together = one_pass(1, 2, 3, 4)
    for line in together:
        line["req_id"] = "a" if line["token_idx"] < 3 else "b"
    steps = [line | {"req_id": "ab"[line["token_idx"]]} for line in one_pass(5, 6)]
    trace = read_foreign(written(tmp_path / "t.jsonl", META, *together, *steps, *steps)).trace
    assert trace.sequence.tolist() == [0, 0, 0, 1, 0, 1, 0, 1]
    assert trace.kind.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert trace.num_forwards == 3


def test_mixed_requests_are_refused(tmp_path):
    """Two passes of several tokens in a row are of several requests."""
    path = written(tmp_path / "t.jsonl", META, *one_pass(1, 2, 3), *one_pass(4, 5), *one_pass(6, 7))
    with pytest.raises(TraceError, match=r"mix several requests.*max_num_seqs=1"):
        read_foreign(path)


def test_one_request_id_for_all_is_no_request_id(tmp_path):
    """A logger that writes r1 everywhere tells nothing apart: passes still begin sequences."""
    lines = [line | {"req_id": "r1"} for line in [*WARM_UP, *FIRST, *SECOND]]
    trace = read_foreign(written(tmp_path / "t.jsonl", META, *lines)).trace
    assert trace.sequence.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    mixed = [line | {"req_id": "r1"} for line in one_pass(1, 2) + one_pass(3, 4)]
    with pytest.raises(TraceError, match="mix several requests"):
        read_foreign(written(tmp_path / "t.jsonl", META, *mixed))


def test_a_warm_up_alone_is_refused(tmp_path):
    """Nothing else is in it."""
    with pytest.raises(TraceError, match="while requests are served"):
        read_foreign(written(tmp_path / "t.jsonl", META, *WARM_UP))


def test_numbers_that_go_on_are_one_sequence_and_say_so(tmp_path):
    """Without passes or requests nothing tells prompts from answers; the command says that."""
    lines = [line | {"token_idx": 5} for line in one_pass(4)] + one_pass(1, 2, 3)
    path, out = written(tmp_path / "t.jsonl", META, *lines), tmp_path / "t.safetensors"
    done = CliRunner().invoke(app, ["import-trace", str(path), "--out", str(out)])
    assert done.exit_code == 0
    assert "one sequence" in done.stderr and "taken as completions" in done.stderr
    assert Trace.load(out).experts[:, 0, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk_ids": [1, 8]}, "row 2 has the value 8 as its expert"),
        ({"topk_ids": [1, 1]}, "row 2 chooses an expert twice"),
        ({"topk_ids": [1.5, 2.5]}, "row 2 has the value 1.5"),
        ({"layer": -1}, "row 2 has the value -1 as its layer"),
        ({"topk_ids": "1 2"}, "cannot be read|no lists"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, change, words):
    """By its number in the file, header lines counted."""
    lines = one_pass(1, 2, layers=1)
    with pytest.raises(TraceError, match=words):
        read_foreign(written(tmp_path / "t.jsonl", META, lines[0] | change, lines[1]))
