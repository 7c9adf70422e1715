"""The card's price and savings against control and base."""

import shutil
from itertools import pairwise

import pytest

from melinoe.checkpoint import read_metadata, write_metadata
from melinoe.cli.app import app
from melinoe.errors import CheckpointError
from melinoe.report.card import write_card
from melinoe.report.figures import COLOUR


@pytest.fixture
def held(beside_control, tmp_path):
    """The melinoe.json of a run that was measured beside its control."""
    path = tmp_path / "its-model"
    path.mkdir()
    shutil.copy(beside_control / "melinoe.json", path)
    return path


def body(path):
    """The lines of the card below the heading on what fine-tuning changed."""
    write_card(path)
    text = (path / "README.md").read_text()
    return text.split("## What fine-tuning changed\n\n")[1].split("\n")


def shown(estimate):
    """A share as a sentence has it, written here."""
    ends = (estimate["mean"], estimate["low"], estimate["high"])
    mean, low, high = (f"{100 * end:+.1f}".replace("-", "\N{MINUS SIGN}") for end in ends)
    return f"{mean} % [{low}, {high}]"


@pytest.mark.usefixtures("words_alone")
def test_the_first_lines_are_the_price_over_the_control(held):
    """In domain first, then out of domain; the base's share stands in the tables."""
    change = read_metadata(held)["outcome"]["change_from_control"]["perplexity"]
    lines = body(held)
    assert "against its control, the same training without the locality terms" in lines[0].lower()
    assert f"at a price of **{shown(change['words'])}** in perplexity on held-out w" in lines[0]
    price = f"perplexity on held-out far {shown(change['far'])}"
    assert f"Price out of domain, against the control: {price}" in lines[0].replace("*", "")


@pytest.mark.usefixtures("words_alone")
def test_paragraphs_headings_and_tables_of_a_card_stand_apart(held):
    """An empty line before each heading, and behind the verdict: Markdown joins what has none."""
    lines = body(held)
    assert lines[1] == "" and lines[2]
    text = (held / "README.md").read_text().split("---\n\n")[1].split("\n")
    for before, line in pairwise(text):
        if line.startswith("#") or (line.startswith("|") and not before.startswith("|")):
            assert before == "", line


@pytest.mark.usefixtures("words_alone")
def test_the_tables_have_a_column_of_the_control_and_one_of_the_change_from_it(held):
    """Perplexity and both kinds of locality; as many cells in every row as there are headings."""
    text = "\n".join(body(held))
    for name in ("perplexity", "writing", "reading"):
        head = f"| {name} | before | control | after | from before | from control |"
        table = text.split(head + "\n")[1].split("\n\n")[0]
        assert {row.count(" | ") for row in table.split("\n")} == {5}
    control = read_metadata(held)["outcome"]["control"]["perplexity"]["words"]["perplexity"]
    row = next(line for line in text.split("\n") if line.startswith("| words (in domain) |"))
    assert row.split(" | ")[2].startswith(f"{control['mean']:,.4g}"[:4])


def test_the_figures_show_the_control_in_its_colour(held, copy):
    """A third model, which the figures of a run without a control have no trace of."""

    def orange(path):
        return sum(COLOUR["control"] in file.read_text() for file in write_card(path)[1:])

    assert orange(held) == 1  # experts per completion
    assert orange(copy) == 0


@pytest.mark.usefixtures("words_alone")
def test_without_a_control_one_sentence_says_so_and_how_to_measure_it(copy, held):
    """Of a run for locality; of the control itself there is nothing to ask."""

    def said(path):
        text = "\n".join(body(path))
        return text.count("What the locality terms saved and cost was not measured.")

    assert said(copy) == 1 and said(held) == 0
    text = (copy / "README.md").read_text()
    assert all(f"`{flag}`" in text for flag in ("--against DIR", "--against control"))
    off = {"lambda_cache": 0.0, "lambda_rank": 0.0}
    write_metadata(copy, read_metadata(copy) | {"settings": off})
    assert said(copy) == 0


@pytest.mark.usefixtures("words_alone")
def test_a_control_trained_otherwise_is_not_called_like_for_like(held):
    """What differs from it may be a teacher's doing."""
    whole = "what differs from it is their doing"
    assert whole in "\n".join(body(held))
    metadata = read_metadata(held)
    metadata["outcome"]["control_run"]["settings"]["lambda_replay"] = 7.0
    write_metadata(held, metadata)
    assert whole not in "\n".join(body(held))


def test_the_card_command_writes_it_again_from_the_record_alone(held):
    """Without a weight, a base or a control in reach: the same bytes."""
    from typer.testing import CliRunner

    write_card(held)
    files = {path.name: path.read_bytes() for path in held.iterdir()}
    for path in held.iterdir():
        if path.name != "melinoe.json":
            path.unlink()
    assert CliRunner().invoke(app, ["card", str(held)]).exit_code == 0
    assert {path.name: path.read_bytes() for path in held.iterdir()} == files


def test_a_control_that_says_half_is_named_with_its_field(held):
    """As any other malformed record."""
    metadata = read_metadata(held)
    metadata["outcome"]["control"] = {"writing": {}}
    write_metadata(held, metadata)
    with pytest.raises(CheckpointError, match=r"outcome\.control has no 'perplexity'"):
        write_card(held)
