# ruff: noqa: RUF001  (dashes and signs are what a report shows)
"""The page and its twin: self-contained, well-formed, and true to the records."""

import re
from html.parser import HTMLParser

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


def test_the_page_asks_for_nothing_outside_itself(page):
    """Every reference is to an id of the page, and no address stands anywhere in it."""
    checker = parse(page)
    assert checker.references
    assert all(reference.startswith("#") for reference in checker.references)
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    assert not {"script", "link", "img", "iframe", "object"} & set(checker.tags)


def test_every_element_closes_and_every_reference_finds_its_id(page):
    """Balanced by a parser that knows void elements; ids are unique across all drawings."""
    checker = parse(page)
    assert checker.faults == []
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    clips = re.findall(r"url\(#([^)]+)\)", page.read_text())
    assert {reference[1:] for reference in checker.references} | set(clips) <= set(checker.ids)


def test_every_figure_is_drawn_in_the_pages_own_colours(page):
    """Locality, two curves, corpora, predictor, three losses: eight panels, none in fixed ink."""
    text = page.read_text()
    drawings = re.findall(r"<svg .*?</svg>", text, flags=re.S)
    assert len(drawings) == 8
    for drawing in drawings:
        assert "var(--ink)" in drawing or "var(--muted)" in drawing
        assert not re.search(r"(fill|stroke): #", drawing)
        assert 'aria-label="' in drawing


def test_captions_say_what_the_records_say(page):
    """Means of the fixture, exact by construction: 21.25, 9.75 and 21.5 of 32 experts."""
    text = " ".join(parse(page).text)
    assert re.search(
        r"A sequence of the fine-tuned model uses 9\.75 \[.*?\] of 32 experts per layer, fewer "
        r"than the control's 21\.5 \[.*?\] and fewer than the base's 21\.2 \[.*?\]\. All sequences "
        r"together use: base 31\.5, control 31\.5 and fine-tuned 31\.5",
        text,
    )
    assert "needs 2.30 [2.15, 2.48] times fewer expert transfers per token than the base" in text
    # 5.968 / 2.528, and the widest range of 5.843..6.093 over 2.403..2.653.
    assert "against the control, 5.97 [5.84, 6.09], 2.36 [2.20, 2.54] times fewer." in text
    assert "fine-tuned: best the prefill's experts, 74.0 % [72.9, 75.1]" in text


def test_a_caption_follows_its_data(records, tmp_path):
    """Make the fine-tuned model worse: the words turn round."""
    records = of_kinds(records, "serve", "locality")
    for record in records:
        if record["kind"] == "locality" and record["model"] == "fine-tuned":
            record["experts_per_sequence"] = [30.0, 31.0, 30.0, 31.0]
        if record["kind"] == "serve" and record["model"] == "fine-tuned":
            record["transfers_per_token"] = {"mean": 11.648, "low": 11, "high": 12, "n": 9}
    write_report(records, tmp_path / "r.html")
    text = " ".join(parse(tmp_path / "r.html").text)
    assert re.search(
        r"of 32 experts per layer, more than the control's .* and more than the b", text
    )
    assert "needs 2.00 [1.85, 2.11] times more expert transfers" in text


def test_overlapping_intervals_are_not_called_different(records, tmp_path):
    """The same values for both models: no measurable change."""
    records = of_kinds(records, "locality")
    base = next(record for record in records if record["model"] == "base")
    for record in records:
        if record is not base:
            record["experts_per_sequence"] = base["experts_per_sequence"]
    write_report(records, tmp_path / "r.html")
    text = " ".join(parse(tmp_path / "r.html").text)
    assert (
        text.count("no difference shown from the ") >= 2
        and "fewer than" not in text.split("How to")[0]
    )


def test_one_prompt_alone_is_not_called_a_difference(records, tmp_path):
    """An interval over one item has no width, so it touches nothing; no sentence follows of it."""
    records = of_kinds(records, "serve", "locality")
    for record in records:
        if record["kind"] == "locality":
            record["experts_per_sequence"] = record["experts_per_sequence"][:1]
        if record["kind"] == "serve" and record["strategy"] in ("base", "fine-tuned"):
            loads = [10] if record["strategy"] == "base" else [5]
            record["per_prompt"] = {"loads": loads, "tokens": [10]}
    write_report(records, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "no difference shown from the control" in text
    assert "times fewer expert" not in text


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


def test_the_price_is_the_paired_increase_over_the_control_where_it_was_measured(records, tmp_path):
    """A paired +1.8 % [+0.9, +2.6] stands instead of two intervals that overlap."""
    records = of_kinds(records, "serve", "quality")
    for record in records:
        if record["model"] == "fine-tuned" and record.get("in_domain"):
            over = {"mean": 0.018, "low": 0.009, "high": 0.026, "n": 200}
            record["increase_over_control"] = over
    write_report(records, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "+1.8 % [+0.9, +2.6] in domain (19.88 [19.18, 20.57] against 19.53" in text


def test_a_price_is_said_of_a_like_for_like_control_alone(records, tmp_path):
    """A control without the teacher that the fine-tuned model had: the change is no price."""
    records = of_kinds(records, "serve", "quality", "training")
    said = {}
    for weight in (0.0, 10.0):
        for record in records:
            if record["kind"] == "training" and record["model"] == "fine-tuned":
                record["settings"] = {"steps": 300, "lambda_cache": 1.0, "lambda_match": weight}
        write_report(records, tmp_path / "r.html")
        said[weight] = (tmp_path / "r.md").read_text()
    assert "Its price in perplexity, over the control, the same training without the" in said[0.0]
    assert "not like for like" not in said[0.0]
    unlike = "not like for like (it differs in lambda\\_match too, so that no difference is the"
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
    name = "<b>&\"x'"
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
    assert "<b>" not in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize(
    ("kind", "title"),
    [
        ("serve", "Strategies"),
        ("locality", "Locality"),
        ("curve", "Cache size and policy"),
        ("quality", "Quality"),
        ("predictor", "Prediction"),
        ("training", "Training"),
    ],
)
def test_a_section_without_records_is_left_out_with_a_note(records, tmp_path, kind, title):
    """Take one kind away: its heading goes, a note stays, the rest is whole."""
    from melinoe.report.contents import assemble
    from melinoe.report.page import html_page
    from melinoe.report.records import read_records

    # One other kind besides, so that few figures are drawn.
    kept = [r for r in records if r["kind"] == ("quality" if kind != "quality" else "locality")]
    text = html_page(assemble(read_records(kept)))
    assert f"{title}: no records of kind &#39;{kind}&#39;, so left out." in text
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
