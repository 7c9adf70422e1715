"""Experts by sequence and layer, hit rate by layer, and one generation token by token."""

from report_records import estimate, serve_record

from melinoe.report import read_records, write_report
from melinoe.report.figures import layers, timeline, usage
from melinoe.report.tables import servings


def usage_record(model, counts):
    return {
        "kind": "usage",
        "model": model,
        "num_experts": 4,
        "layers": 1,
        "shown_layers": [0],
        "counts": counts,
    }


def timeline_record(model, loads):
    return {
        "kind": "timeline",
        "model": model,
        "slots": 2,
        "num_experts": 4,
        "policy": "lru",
        "link": None,
        "ms": [2.0] * len(loads),
        "stall_ms": [0.5] * len(loads),
        "loads": loads,
        "tokens": ["a"] * len(loads),
    }


def test_usage_counts_the_experts_that_take_half_and_nine_tenths_of_the_choices():
    """8 of 10 choices on one expert: 1 takes half, 2 take nine tenths; spread evenly: 2 and 4."""
    found = read_records(
        [usage_record("base", [[[5, 5, 5, 5]]]), usage_record("fine-tuned", [[[8, 1, 1, 0]]])]
    )
    figure = usage(found)
    assert [[cell.text for cell in row] for row in figure.table.rows] == [
        ["base", "2.00", "4.00"],
        ["fine-tuned", "1.00", "2.00"],
    ]
    assert len(figure.panels) == 2
    assert "<image" in figure.panels[0]


def test_the_timeline_counts_loads_and_tokens_without_any():
    """Three tokens of two layers, loads 1+1, 0 and 2: four loads, one token free of them."""
    figure = timeline(read_records([timeline_record("base", [[1, 1], [0, 0], [2, 0]])]))
    (row,) = figure.table.rows
    assert [cell.text for cell in row] == ["base", "3", "n/a", "4", "1", "2.00", "1.50"]


def test_layers_without_figures_are_of_no_strategy():
    """Only the base's runs list them; a strategy without is left out."""
    rates = [estimate(0.9, 0.01), estimate(0.4, 0.02)]
    found = read_records([serve_record("base", hit_rate_by_layer=rates), serve_record("control")])
    figure = layers(found, servings(found)[0])
    assert [row[0].text for row in figure.table.rows] == ["base"]


def test_layers_that_served_no_token_are_left_out_and_the_others_keep_their_numbers():
    """A model of two stacks whose first never ran."""
    rates = [None, None, estimate(0.9, 0.01), estimate(0.4, 0.02)]
    found = read_records([serve_record("base", hit_rate_by_layer=rates)])
    figure = layers(found, servings(found)[0])
    assert figure.table.columns == ["strategy", "layer 2", "layer 3"]


def test_a_page_without_these_records_says_nothing_of_them(tmp_path):
    """Older runs have neither: the page is written without the figures, and without an error."""
    write_report([serve_record("base")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "token by token" not in page
    assert "Hit rate by layer" not in page
