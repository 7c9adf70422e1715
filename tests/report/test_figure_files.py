"""Figures as files of their own: complete, and legible without the page."""

import re
from xml.etree import ElementTree

from report_records import curve_record

from melinoe.report import figures_of
from melinoe.report.page import svg_files

CURVES = [curve_record(model, "lru") for model in ("base", "fine-tuned")]
SVG = "{http://www.w3.org/2000/svg}"


def test_each_panel_is_an_svg_that_needs_nothing_else():
    """Two curves: valid XML, legible on light and dark, nothing referred to."""
    files = svg_files(figures_of(CURVES))
    assert list(files) == ["curves-1.svg", "curves-2.svg"]
    for text in files.values():
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert "prefers-color-scheme: dark" in text
        outside = re.findall(r"https?://[^\s\"<]+", text)
        assert set(outside) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
        labels = {"".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")}
        assert {"LRU", "hit rate (%)"} <= labels
