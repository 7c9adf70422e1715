"""`melinoe import-trace`."""

from foreign_files import CSV
from typer.testing import CliRunner

from melinoe.cache.trace import Trace
from melinoe.cli.app import app
from melinoe.errors import MelinoeError


def run(*arguments):
    return CliRunner().invoke(app, ["import-trace", *map(str, arguments)])


def test_the_command_writes_a_trace(tmp_path):
    """A table becomes a trace, which simulate takes."""
    table, out = tmp_path / "t.csv", tmp_path / "t.safetensors"
    table.write_text(CSV)
    assert run(table, "--num-experts", 6, "--out", out).exit_code == 0
    assert Trace.load(out).num_sequences == 2


def test_the_command_refuses_what_is_no_table(tmp_path):
    """A place that is taken, no file, and an ending that tells nothing."""
    table, odd = tmp_path / "t.csv", tmp_path / "odd.xyz"
    table.write_text(CSV)
    odd.write_text("")
    for arguments, words in (
        ((table, "--out", table), "exists"),
        ((tmp_path / "absent.csv", "--out", tmp_path / "x"), "no file"),
        ((odd, "--out", tmp_path / "x"), ".parquet"),
    ):
        error = run(*arguments).exception
        assert isinstance(error, MelinoeError) and words in str(error)
