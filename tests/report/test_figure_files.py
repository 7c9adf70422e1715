"""Figures as files of their own: complete, legible without the page, and refused where none is."""

import re
from xml.etree import ElementTree

import pytest
from report_records import curve_record, demo_record
from typer.testing import CliRunner

from melinoe.cli.app import app
from melinoe.errors import DataError
from melinoe.report import figures_of, write_figures

CURVES = [curve_record(model, "lru") for model in ("base", "fine-tuned")]
SVG = "{http://www.w3.org/2000/svg}"


def test_each_panel_is_an_svg_that_needs_nothing_else(tmp_path):
    """Two curves: valid XML, legible on light and dark, nothing referred to."""
    paths = write_figures(figures_of(CURVES), tmp_path / "made" / "here")
    assert [path.name for path in paths] == ["curves-1.svg", "curves-2.svg"]
    for path in paths:
        text = path.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert "prefers-color-scheme: dark" in text
        outside = re.findall(r"https?://[^\s\"<]+", text)
        assert set(outside) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        labels = {"".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")}
        assert {"LRU", "hit rate (%)"} <= labels


def test_records_without_a_figure_are_refused(tmp_path):
    """Settings alone have nothing to draw, and no directory is made for them."""
    with pytest.raises(DataError, match="none of these records makes a figure"):
        write_figures(figures_of([demo_record()]), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    """A file stands where the directory should."""
    (tmp_path / "taken").write_text("x")
    with pytest.raises(DataError, match=r"cannot write .*taken"):
        write_figures(figures_of(CURVES), tmp_path / "taken")


def test_figures_and_readme_are_two_things(tmp_path):
    """Wrong usage: exit 2."""
    args = ["report", str(tmp_path), "--figures", str(tmp_path), "--readme", "README.md"]
    assert CliRunner().invoke(app, args).exit_code == 2
