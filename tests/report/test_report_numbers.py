# ruff: noqa: RUF001  (dashes and signs are what a report shows)
"""What stands in the tables: numbers written by hand beside those a table shows."""

import math

import pytest

from melinoe.errors import DataError
from melinoe.report import read_records, render_table
from melinoe.report.comparing import geometric_mean
from melinoe.report.table import inline, label, plain
from melinoe.report.tables import corpus_table, main_table, servings, time_table
from melinoe.stats import Estimate

EMULATED = {"bandwidth_gb_s": 0.5, "latency_us": 50, "emulated": True}


def row(table, name):
    """Cells of the row called *name*, each on one line, by heading."""
    cells = next(cells for cells in table.rows if cells[0].text == name)
    return {head: cell.inline() for head, cell in zip(table.columns, cells, strict=True)}


def main(records):
    found = read_records(records)
    return main_table(found, servings(found)[0])


def test_the_main_table_shows_mean_interval_and_ratio_to_base(records):
    """
    Hand-formatted from the records: 5.824 / 2.528 = 2.304 from base, .631 / .62 from control.

    Every prompt of the fixture has the same rates, so that paired intervals have no width.
    """
    shown = row(main(records), "fine-tuned")
    assert shown["hit rate"] == "84.2 % [83.0–85.4]"
    assert shown["transfers / token"] == "2.53 [2.40–2.65] (÷ 2.30 [2.30, 2.30])"
    assert shown["perplexity in domain"] == "19.88 [19.18–20.57] (+1.8 % [+1.8, +1.8])"
    assert row(main(records), "control")["perplexity in domain"].endswith(
        "(−38.0 % [−38.0, −38.0])"
    )
    assert shown["tokens/s, unmodified link"] == "26.0 [25.5–26.5] (× 1.21 [1.21, 1.21])"
    assert (
        shown["tokens/s, emulated link 0.5 GB/s, 50 µs"] == "6.50 [6.00–7.00] (× 1.21 [1.21, 1.21])"
    )


def test_rows_stand_in_their_fixed_order_whatever_order_they_came_in(records):
    """Base first, then what is compared with it, the all-resident run last."""
    names = [cells[0].text for cells in main(records[::-1]).rows]
    expected = ["base", "control", "fine-tuned", "fine-tuned + prefetch", "all resident"]
    assert names == expected


def test_prefetch_is_scored_with_the_perplexity_of_its_own_model(records):
    """Prefetching changes no answer, so both rows show the fine-tuned model's perplexity."""
    table = main(records)
    name = "perplexity in domain"
    assert row(table, "fine-tuned + prefetch")[name] == row(table, "fine-tuned")[name]


def test_a_prefetch_is_not_passed_off_as_fewer_transfers(records):
    """The main table counts transfers on demand; what was copied ahead stands in a note."""
    notes = " ".join(main(records).notes)
    assert "fine-tuned + prefetch copies 0.310 [0.310–0.310] more per token ahead of need" in notes


def test_what_was_not_measured_is_said_so(records):
    """The all-resident run has no emulated record: no number is made up for it."""
    shown = row(main(records), "all resident")
    assert shown["tokens/s, emulated link 0.5 GB/s, 50 µs"] == "n/a"


def test_out_of_domain_is_the_geometric_mean_of_the_other_corpora(records):
    """Computed apart: exp of the mean log of the base's five means."""
    others = [r["perplexity"]["mean"] for r in records if r["kind"] == "quality"]
    base = [31.5 + 11 * number for number in range(1, 6)]
    assert set(base) <= set(others)
    expected = math.prod(base) ** (1 / 5)
    assert row(main(records), "base")["perplexity out of domain"].startswith(f"{expected:.2f} ")


def test_geometric_mean_of_equal_estimates_narrows_with_their_number():
    """Four corpora, each 10 within a factor of e^0.2: the mean lies within e^0.1."""
    one = Estimate(10.0, 10 * math.exp(-0.2), 10 * math.exp(0.2), 5)
    mean = geometric_mean([one] * 4)
    assert mean.mean == pytest.approx(10)
    assert mean.low == pytest.approx(10 * math.exp(-0.1))
    assert mean.high == pytest.approx(10 * math.exp(0.1))
    assert mean.n == 20


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (727.4, 3, "727"),
        (21.34, 3, "21.3"),
        (3.508, 3, "3.51"),
        (0.0523, 3, "0.0523"),
        (1306.2, 3, "1,306"),
        (0, 3, "0.00"),
        (19.876, 4, "19.88"),
    ],
)
def test_numbers_keep_their_significant_digits(value, digits, text):
    """Three digits unless asked for more; never an exponent, thousands apart."""
    assert plain(value, digits) == text


def test_an_interval_below_zero_cannot_be_taken_for_a_range_of_positives():
    """-0.4–0.4 would read as a dash of its own; a comma or "to" keeps the sign clear."""
    assert inline(Estimate(0.0, -0.4, 0.4, 2)) == "0.00 [-0.40, 0.40]"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("load_s", "load (s)"),
        ("decide_us", "decide (µs)"),
        ("memory_gib", "memory (GiB)"),
        ("bandwidth_gb_s", "bandwidth (GB/s)"),
        ("tokens_per_s", "tokens / s"),
        ("slots", "slots"),
    ],
)
def test_a_name_says_its_unit_in_brackets(key, text):
    """Units end the names of our records; people read them in brackets."""
    assert label(key) == text


def test_each_cache_configuration_has_its_own_table(records, make_serve):
    """Runs at 16 slots do not mix with those at 8; the all-resident run joins both."""
    more = make_serve("base", slots=16)
    found = read_records([*records, more])
    eight, sixteen = servings(found)
    assert (eight.slots, sixteen.slots) == (8, 16)
    assert sixteen.strategies == ["base", "all resident"]
    assert sixteen.title == "16 of 32 experts per layer resident (50 %), LRU"


def test_a_repeated_run_replaces_the_earlier_one_and_the_report_says_so(records, make_serve):
    """The later record of the same strategy and link stands."""
    rate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    found = read_records([*records, make_serve("base", hit_rate=rate)])
    table = main_table(found, servings(found)[0])
    assert row(table, "base")["hit rate"] == "50.0 % [40.0–60.0]"
    assert found.notes == ["1 serve record(s) repeat an earlier one; the later one stands."]


def test_the_corpus_table_has_every_model_on_every_corpus(records):
    """Six corpora, three models; the corpus trained on comes first and says so."""
    table = corpus_table(read_records(records))
    assert table.columns == ["corpus", "base", "control", "fine-tuned"]
    assert table.rows[0][0].text == "grade-school mathematics (trained on)"
    assert row(table, "encyclopedia")["control"] == "44.20 [42.65–45.75] (+4.0 % [+4.0, +4.0])"


def test_times_stand_per_link(records):
    """Two links: each time has a column for either."""
    table = time_table(servings(read_records(records))[0])
    assert row(table, "base")["stall (ms / token), unmodified link"] == "8.74 [8.34–9.14]"
    assert row(table, "all resident")[table.columns[2]] == "n/a"


def test_a_terminal_gets_one_line_a_figure(records):
    """No number is cut at any width."""
    text = render_table(records, "text")
    assert "perplexity in domain                     19.53 [18.85–20.21]" in text
    assert (
        "  transfers / token                        2.53 [2.40–2.65] (÷ 2.30 [2.30, 2.30])" in text
    )


def test_markdown_has_one_row_per_strategy(records):
    """Heading, rule and five rows, all with eight columns."""
    lines = [line for line in render_table(records, "markdown").splitlines() if line[:1] == "|"]
    assert len(lines) == 7
    assert {line.count("|") for line in lines} == {9}
    assert "| fine-tuned | 84.2 % [83.0–85.4] |" in lines[4]


def test_records_that_make_no_table_are_refused(records):
    """A training log alone has no row to show."""
    logs = [record for record in records if record["kind"] == "training"]
    with pytest.raises(DataError, match="no record makes a table"):
        render_table(logs)
