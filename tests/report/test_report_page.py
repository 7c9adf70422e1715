# ruff: noqa: RUF001  (dashes and signs are what a report shows)
"""The page and its twin: self-contained, well-formed, and true to the records."""

import re
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from melinoe.errors import DataError
from melinoe.report import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
REFERENCES = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}


class Checker(HTMLParser):
    """Collects what is not balanced, every reference, every id, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.references = [], [], []
        self.ids, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key in REFERENCES:
                self.references.append(value)
            if key == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append((tag, self.getpos()))

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    checker = Checker()
    checker.feed(path.read_text())
    checker.close()
    return checker


def of_kinds(records, *kinds):
    """Fewer records, so that fewer figures are drawn."""
    return [record for record in records if record["kind"] in kinds]


def drawings(path):
    """The figures that lie in a page, as SVG."""
    data = [one for one in parse(path).references if one.startswith("data:image/svg+xml;base64,")]
    return [b64decode(one.partition(",")[2]).decode() for one in data]


def test_the_page_asks_for_nothing_outside_itself(page):
    """Every reference is a drawing that the page holds, and no address stands anywhere in it."""
    checker = parse(page)
    assert len(checker.references) == len(drawings(page))
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object"} & set(checker.tags)
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for drawing in drawings(page):
        assert set(re.findall(r"https?://[^\s\"<]+", drawing)) <= names


def test_every_element_closes(page):
    """Balanced by a parser that knows void elements, page and drawings."""
    checker = parse(page)
    assert checker.faults == []
    assert checker.open == []
    for drawing in drawings(page):
        ElementTree.fromstring(drawing)


def test_every_figure_says_what_it_shows(page):
    """Locality and two curves: three panels, each with words for who cannot see it."""
    text = page.read_text()
    assert len(drawings(page)) == text.count('<img alt="') == 3
    assert 'alt=""' not in text


def test_findings_say_what_the_records_say(page):
    """Means of the fixture, exact by construction: 5.824, 5.968 and 2.528 transfers a token."""
    text = " ".join(parse(page).text)
    assert "needs 2.30 [2.30, 2.30] times fewer expert transfers per token than the base" in text
    assert "against the control, 5.97 [5.84, 6.09], 2.36 [2.36, 2.36] times fewer." in text
    assert re.search(
        r"fine-tuned\n9\.75 \[[\d.–]+\]\n33\.0 % \[.*\]\n31\.5 of 32",
        "\n".join(one.strip() for one in parse(page).text if one.strip()),
    )


def test_a_finding_follows_its_data(records, tmp_path):
    """Make the fine-tuned model worse: the words turn round."""
    records = of_kinds(records, "serve")
    for record in records:
        if record["kind"] == "serve" and record["model"] == "fine-tuned":
            record["transfers_per_token"] = {"mean": 11.648, "low": 11, "high": 12, "n": 9}
            more = [116.48, 232.96, 349.44]
            record["per_prompt"] = {**record["per_prompt"], "loads": more}
    write_report(records, tmp_path / "r.html")
    text = " ".join(parse(tmp_path / "r.html").text)
    assert "needs 2.00 [2.00, 2.00] times more expert transfers" in text


def test_one_prompt_alone_is_not_called_a_difference(records, tmp_path):
    """An interval over one item has no width; no sentence follows of it."""
    records = of_kinds(records, "serve")
    for record in records:
        if record["strategy"] in ("base", "fine-tuned"):
            loads = [10] if record["strategy"] == "base" else [5]
            record["per_prompt"] = {"loads": loads, "tokens": [10]}
    write_report(records, tmp_path / "r.html")
    assert "times fewer expert" not in (tmp_path / "r.html").read_text()


def test_ratios_are_paired_over_prompts_where_the_runs_list_them(records, tmp_path):
    """Every prompt moves exactly half as much: 2.00 with no width, though the means vary widely."""
    records = of_kinds(records, "serve")
    loads = [10, 400, 30, 80, 220, 60]
    for record in records:
        if record["kind"] == "serve" and record["strategy"] in ("base", "fine-tuned"):
            share = 1 if record["strategy"] == "base" else 0.5
            some = {"loads": [share * load for load in loads], "tokens": [10] * 6}
            record["per_prompt"] = some
    write_report(records, tmp_path / "r.html")
    assert "needs 2.00 [2.00, 2.00] times fewer" in (tmp_path / "r.html").read_text()


def test_the_price_is_the_paired_increase_over_the_control(records, tmp_path):
    """.631 over .62 of the base's perplexity in domain, 1.05 over 1.04 out of it."""
    write_report(of_kinds(records, "serve", "quality"), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "+1.8 % [+1.8, +1.8] in domain (19.88 [19.18, 20.57] against 19.53" in text
    assert "+1.0 % [+1.0, +1.0] out of domain" in text


def test_a_price_is_said_of_a_like_for_like_control_alone(records, tmp_path):
    """A control without the teacher that the fine-tuned model had: the change is no price."""
    records = of_kinds(records, "serve", "quality", "training")
    said = {}
    for weight in (0.0, 10.0):
        for record in records:
            if record["kind"] == "training" and record["model"] == "fine-tuned":
                record["settings"] = {"steps": 300, "lambda_cache": 1.0, "lambda_replay": weight}
        write_report(records, tmp_path / "r.html")
        said[weight] = (tmp_path / "r.md").read_text()
    assert "Its price in perplexity, over the control, the same training without the" in said[0.0]
    assert "not like for like" not in said[0.0]
    unlike = "not like for like (it differs in lambda\\_replay too, so that no difference is the"
    assert said[10.0].count(unlike) == 3  # the finding, and below both tables
    assert "price in perplexity" not in said[10.0]


def test_without_a_control_the_price_is_not_known(records, tmp_path):
    """Said where the price would stand."""
    records = [r for r in of_kinds(records, "serve", "quality") if r.get("model") != "control"]
    write_report(records, tmp_path / "r.html")
    text = (tmp_path / "r.md").read_text()
    assert "No control was measured, so the price is not known." in text
    assert "Changes of perplexity are from base." in text


def test_words_from_records_are_escaped(records, tmp_path):
    """A model's name is data, in the page, in the drawings and in the twin."""
    name = "<b>&\"x'![i](//e)&copy;"
    for record in records:
        if record.get("model") == "control":
            record["model"] = name
        if record.get("strategy") == "control":
            record["strategy"] = name
    write_report(records, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<b>&" not in text
    assert parse(tmp_path / "r.html").faults == []
    assert "&lt;b&gt;&amp;" in text
    for asked in ('http://e.example/x.png"', "<a href", "©"):
        assert asked not in text
    assert "<b>" not in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("serve", "Strategies"),
        ("locality", "Locality"),
        ("curve", "Cache size and policy"),
        ("quality", "Quality"),
        ("predictor", "Prediction"),
    ],
)
def test_a_section_without_records_is_left_out_with_a_note(records, tmp_path, kind, title):
    """Take one kind away: its heading goes, a note stays, the rest is whole."""
    from melinoe.report.page import assemble, html_page
    from melinoe.report.records import read_records

    # One other kind besides, so that few figures are drawn.
    kept = [r for r in records if r["kind"] == ("quality" if kind != "quality" else "locality")]
    text = html_page(assemble(read_records(kept)))
    assert f"{title}: no records of kind '{kind}', so left out." in text
    assert f"<h2>{title}</h2>" not in text


def test_the_twin_has_the_same_rows_as_the_page(page):
    """Markdown with every section's heading and the main table's numbers, no HTML tags."""
    text = page.with_suffix(".md").read_text()
    headings = re.findall(r"^## (.*)$", text, flags=re.M)
    assert headings == re.findall(r"<h2>(.*?)</h2>", page.read_text())
    assert "| fine-tuned | 84.2 % [83.0–85.4] |" in text
    assert not re.search(r"</?[a-z]+>", text)


def test_the_same_records_give_the_same_bytes(page, records, tmp_path):
    """No clock, no random ids: a report can be compared with an earlier one."""
    write_report(records, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_a_failing_write_leaves_the_old_report(records, tmp_path, monkeypatch):
    """The disk is full at the last moment: the old page stands, no temporary file is left."""
    out = tmp_path / "r.html"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError, match="No space left"):
        write_report(of_kinds(records, "serve"), out)
    assert [item.name for item in tmp_path.iterdir()] == ["r.html"]
    assert out.read_text() == "old"


def test_the_page_must_be_named_html(records, tmp_path):
    """A twin named like the page itself would overwrite it."""
    with pytest.raises(DataError, match=r"let it end in \.html"):
        write_report(records, tmp_path / "report.md")
