"""Values that no option could use are refused before a command runs, by one look at all of them."""

import io
import json
import os
import socket
from pathlib import Path

import pytest

from melinoe.cli import output
from melinoe.cli.app import app
from melinoe.cli.command import check_number, check_place, checked
from melinoe.errors import MelinoeError
from melinoe.whole_file import write_whole
from tests.fuzz.running import run


def test_pipes_devices_and_sockets_are_no_files(tmp_path):
    """Each is named as what it is; files, directories and what is not there pass."""
    pipe, place = tmp_path / "pipe", tmp_path / "socket"
    os.mkfifo(pipe)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        for path, kind in ((pipe, "a pipe"), ("/dev/zero", "a device"), (place, "a socket")):
            with pytest.raises(MelinoeError, match=f"is {kind}, not a file"):
                check_place(path)
    for path in (tmp_path, __file__, tmp_path / "absent", "x" * 5000, "/dev/stdin", "/dev/fd/0"):
        check_place(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2**63, -(10**40)])
def test_numbers_that_are_none_are_named_with_their_option(value):
    """2**63 - 1 is the largest integer that fits 64 bits with a sign."""
    with pytest.raises(MelinoeError, match=r"--max-new-tokens cannot be .*; give a finite number"):
        check_number("max_new_tokens", value)
    check_number("max_new_tokens", 2**63 - 1)
    check_number("gamma", 1e308)


def test_every_command_looks_at_its_values(tmp_path):
    """A pipe in place of the first argument that is a file, whatever the command."""
    assert all(hasattr(one.callback, "__wrapped__") for one in app.registered_commands)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for words in (
        ["simulate", pipe, "--slots", "2"],
        ["predictor", "fit", pipe, "--out", tmp_path / "out"],
    ):
        ended = run(words)
        assert ended.code == 1 and "is a pipe, not a file" in ended.err, ended
    ended = run(["generate", "no-such-model", str(pipe)])  # a prompt is text, whatever it names
    assert "is a pipe" not in ended.err


def test_a_file_replaces_no_pipe(tmp_path):
    """Renaming a file over a device would take the device away."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a file"):
        write_whole(pipe, "text")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_a_sentence_of_thousands_of_characters_is_shortened():
    """The value is repeated in part; beginning and end of the sentence stay."""
    ended = run(["doctor", "n" * 5000])
    assert ended.code == 1 and len(ended.err) < 1100 and " ... " in ended.err
    assert ended.err.startswith("melinoe: nnn") and ended.err.endswith("put that right\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["generate", "tiny", "a", "--ram", "9" * 5000], 1, "is not an amount of memory"),
        (["generate", "tiny", "a", "--expert-memory", "0." + "9" * 5000], 1, "amount of memory"),
        (["plan", "tiny", "--gpu-memory", "9" * 5000], 1, "is not an amount of memory"),
        (["generate", "tiny", "a", "--seed", "-1"], 2, "--seed"),
        (["serve", "tiny", "--port", "65536"], 2, "--port"),
        (["serve", "tiny", "--host", "\udcff"], 2, "--host"),
        (["serve", "tiny", "--host", "\xfc" * 100], 2, "--host"),
        (["finetune", "tiny", "--seed", "-1"], 1, "seed cannot be -1"),
        (["finetune", "tiny", "--seed", str(2**32)], 1, "seed cannot be 4294967296"),
        (["finetune", "tiny", "--learning-rate", "1e300"], 1, "learning_rate cannot be 1e+300"),
    ],
)
def test_a_value_that_no_library_takes_is_refused_in_a_sentence(tmp_path, words, code, said):
    """Python reads 4,300 digits, numpy seeds of 32 bits, Adam rates that a float32 holds."""
    if words[0] == "finetune":
        (tmp_path / "d.jsonl").write_text('{"text": "a b c d"}\n')
        words = [*words, "--data", tmp_path / "d.jsonl", "--out", tmp_path / "out"]
    ended = run(words)
    assert ended.wrong is None and ended.code == code and said in ended.err.splitlines()[-1]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_json_in_every_encoding_of_the_terminal(monkeypatch, encoding):
    """Umlauts, a sign beyond 16 bits and half of one, as file names have it."""
    value = {"text": "M\xfcller \U0001f600 \u0663 \udcff"}
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stdout)
    output.show_json(value)
    stdout.flush()
    assert json.loads(raw.getvalue().decode(encoding)) == value


def test_homes_are_written_out_and_unknown_ones_refused(tmp_path, monkeypatch):
    """In arguments, options and lists of them; a prompt is no path."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = {}
    command = checked(lambda **values: seen.update(values))
    command(out=Path("~/a"), data="~/b", runs=[Path("~/c"), Path("d")], prompt="~nobody/x")
    home = Path(tmp_path)
    assert seen["out"] == home / "a" and seen["data"] == str(home / "b")
    assert seen["runs"] == [home / "c", Path("d")] and seen["prompt"] == "~nobody/x"
    for place in ("~nobody-of-that-name/x", "~nobody-of-that-name"):
        for words in (["doctor", place], ["pack", "tiny", "--out", place], ["plan", place]):
            ended = run(words)
            assert ended.code == 1 and not ended.wrong and "write the path out" in ended.err


def test_a_working_directory_that_is_gone_is_said(tmp_path, monkeypatch):
    """One sentence, whatever the command; libraries would end the process in their own words."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    ended = run(["doctor", "tiny"])
    assert ended.code == 1 and not ended.wrong and "working directory is gone" in ended.err
