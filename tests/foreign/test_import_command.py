"""`melinoe import-trace`."""

import torch
from foreign_files import COUNTS, CSV, WRITTEN, gguf
from typer.testing import CliRunner

from melinoe.cache.locality import popularity
from melinoe.cache.statistics import load_counts
from melinoe.cache.trace import Trace
from melinoe.cli.app import app
from melinoe.errors import MelinoeError


def run(*arguments):
    return CliRunner().invoke(app, ["import-trace", *map(str, arguments)])


def test_the_command_writes_traces_and_statistics(tmp_path):
    """A table becomes a trace; its counts, and llama.cpp's, become statistics that static takes."""
    table, out, stats = (tmp_path / name for name in ("t.csv", "t.safetensors", "s.json"))
    table.write_text(CSV)
    assert run(table, "--num-experts", 6, "--out", out).exit_code == 0
    trace = Trace.load(out)
    assert trace.num_sequences == 2
    assert run(table, "--num-experts", 6, "--statistics", "--out", stats).exit_code == 0
    assert (load_counts(stats, trace) == popularity(trace)).all()
    matrix, other = tmp_path / "i.gguf", tmp_path / "o.json"
    matrix.write_bytes(gguf(COUNTS))
    assert run(matrix, "--statistics", "--out", other).exit_code == 0
    assert '"counts": [[1.0, 2.0, 3.0]' in other.read_text()


def test_the_command_refuses_what_has_no_order_as_a_trace(tmp_path):
    """Statistics give popularity and no trace; the way out is named. So are other mistakes."""
    matrix = tmp_path / "i.gguf"
    matrix.write_bytes(gguf(COUNTS))
    for arguments, words in (
        ((matrix, "--out", tmp_path / "x"), "--statistics"),
        ((matrix, "--out", matrix), "exists"),
        ((tmp_path / "absent.csv", "--out", tmp_path / "x"), "no file"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, MelinoeError) and words in str(error)
    odd = tmp_path / "odd.xyz"
    odd.write_text("")
    assert "--format" in str(run(odd, "--out", tmp_path / "x").exception)
    assert run(matrix, "--format", "vllm", "--out", tmp_path / "x").exit_code == 2


def test_the_command_counts_what_is_no_trace(tmp_path):
    """The way out that a refusal names is one: the same file with --statistics."""
    content = torch.load(WRITTEN / "sglang_0.5.23_per_token.pt", weights_only=True)
    content["records"][0]["extend_seq_lens"] = [2, 1]
    path, out = tmp_path / "r.pt", tmp_path / "s.json"
    torch.save(content, path)
    assert "--statistics" in str(run(path, "--out", tmp_path / "t.safetensors").exception)
    assert run(path, "--statistics", "--out", out).exit_code == 0
    assert load_counts(out).sum() == 48
