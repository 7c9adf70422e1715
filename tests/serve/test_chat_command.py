"""`melinoe chat` with lines from standard input."""

import io

import pytest
from serving import TEMPLATE

TOKENS = ("--max-new-tokens", "6", "--slots", "8")


@pytest.fixture
def say(melinoe, monkeypatch, tmp_path):
    """Give the lines of a chat to the command."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)

    def run(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return melinoe("chat", "tiny", "--chat-template", template, *TOKENS, *options)

    return run


def test_each_answer_follows_the_whole_chat(say, offline):
    """Two turns: the second prompt holds the first answer; /cost tells what that took."""
    write = offline[0]
    first = write("user: Hello\nassistant:", 6)
    second = write(f"user: Hello\nassistant: {first}\nuser: More\nassistant:", 6)
    code, out, err = say("Hello", "More", "/cost", "/exit", "never read")
    assert code == 0 and out == f"{first}\n{second}\n"
    assert "hit rate" in err and "experts loaded for each token" in err


def test_a_chat_begins_anew_with_its_system_message(say, offline):
    """After /clear the first turn is forgotten and the system message is not."""
    expected = offline[0]("system: Be kind\nuser: Hello\nassistant:", 6)
    code, out, _ = say("Hello", "/clear", "Hello", options=("--system", "Be kind"))
    assert code == 0 and out == f"{expected}\n{expected}\n"


def test_a_template_that_refuses_ends_no_chat(say, offline):
    """Its words are shown; the next turn, with another system message, is answered."""
    expected = offline[0]("system: calm\nuser: Hi\nassistant:", 6)
    code, out, err = say("/system SHOUT", "Hi", "/system calm", "Hi", "/what")
    assert code == 0 and "no shouting here" in err and out == f"{expected}\n"


def test_lines_that_are_no_text_are_named(say, melinoe, monkeypatch, offline):
    """Half a character ends no chat; bytes that are no UTF-8, or no input, end it in words."""
    expected = offline[0]("user: Hi\nassistant:", 6)
    code, out, err = say("\udcff", "Hi")
    assert code == 0 and "half of a character" in err and out == f"{expected}\n"
    for stdin, words in (
        (
            io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"),
            "is not UTF-8 text (byte 0xff)",
        ),
        (None, "standard input is closed"),
    ):
        monkeypatch.setattr("sys.stdin", stdin)
        code, _, err = melinoe("chat", "tiny", "--chat-template", "plain", *TOKENS)
        assert code == 1 and words in err.splitlines()[-1]


def test_a_model_without_a_template_is_refused(melinoe):
    """One sentence that names the two ways out."""
    code, _, err = melinoe("chat", "tiny")
    assert code == 1 and "--chat-template" in err and "melinoe generate" in err


def test_the_plain_template_writes_roles_and_what_they_say(melinoe, monkeypatch, offline):
    """The shipped model chats without a file; one that is not there is named."""
    expected = offline[0]("user: Hello\nassistant:", 6)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    code, out, _ = melinoe("chat", "tiny", "--chat-template", "plain", *TOKENS)
    assert code == 0 and out == f"{expected}\n"
    code, _, err = melinoe("chat", "tiny", "--chat-template", "no-such-file")
    assert code == 1 and "no-such-file cannot be read" in err
