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


def test_panels_that_stand_side_by_side_have_one_scale():
    """The base's rates begin at 12 %, the tuned model's at 27 %: one axis for both."""

    def rates(text):
        root = ElementTree.fromstring(text)
        axis = next(one for one in root.iter() if one.get("id") == "matplotlib.axis_2")
        return [one.text for one in axis.iter(f"{SVG}text") if (one.text or "").isdigit()]

    base, tuned = map(rates, svg_files(figures_of(CURVES)).values())
    assert base == tuned and base[-1] == "100" and int(base[0]) <= 20
