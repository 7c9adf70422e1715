# ruff: noqa: RUF001  (dashes and signs are what a report shows)
"""README tables: replaced between their markers, checked, and made from benchmark files."""

import json

import pytest

from benchmarks.tables import benchmark_table, benchmark_tables, update_readme
from melinoe.errors import DataError
from melinoe.report import read_records

TEXT = """# Title

<!-- report:demo -->
old
<!-- /report:demo -->

Between.

<!-- report:load-memory --><!-- /report:load-memory -->
Last line.
"""
BENCHMARK = {
    "benchmark": "load_memory",
    "question": "peak memory of loading",
    "result": {
        "peak_bytes": {"median": 3 * 2**30, "min": 2**30, "max": 4 * 2**30},
        "load_s": 12.34,
        "kept": True,
    },
    "machine": {"cpu": "Example CPU", "cores": 2, "gpu": None, "commit": "0123abc"},
}


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    return path


def test_text_between_markers_is_replaced_and_nothing_else(readme, records):
    """Both markers are filled; the lines around them stay as they are."""
    assert update_readme(readme, [*records, BENCHMARK]) == ["demo", "load-memory"]
    text = readme.read_text()
    assert "old" not in text
    assert "| base | 63.6 % [62.4–64.8] |" in text
    assert "| 3.00 [1.00–4.00] | 12.3 | yes |" in text
    assert text.startswith("# Title\n\n<!-- report:demo -->\n")
    assert text.endswith("<!-- /report:load-memory -->\nLast line.\n")
    assert "\n<!-- /report:demo -->\n\nBetween.\n\n<!-- report:load-memory -->\n" in text


def test_updating_twice_changes_nothing(readme, records):
    """The second time there is nothing out of date, and the file is not even touched."""
    update_readme(readme, [*records, BENCHMARK])
    before = readme.read_bytes(), readme.stat().st_mtime_ns
    assert update_readme(readme, [*records, BENCHMARK]) == []
    assert (readme.read_bytes(), readme.stat().st_mtime_ns) == before


def test_check_names_what_is_out_of_date_and_writes_nothing(readme, records):
    """After an update all is well; a changed record makes its own table stale."""
    assert update_readme(readme, [*records, BENCHMARK], check=True) == ["demo", "load-memory"]
    assert readme.read_text() == TEXT
    update_readme(readme, [*records, BENCHMARK])
    assert update_readme(readme, [*records, BENCHMARK], check=True) == []
    slower = {**BENCHMARK, "result": {"load_s": 99.0}}
    assert update_readme(readme, [*records, slower], check=True) == ["load-memory"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker", "has no <!-- report:NAME --> marker"),
        ("\n\n<!-- report:demo -->\n", "line 3: report:demo is not closed"),
        ("<!-- report:what -->", "line 1: no record fills report:what; .* corpora, demo"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_an_error(readme, records, text, message):
    """The file stays as it was."""
    readme.write_text(text)
    with pytest.raises(DataError, match=message):
        update_readme(readme, records)
    assert readme.read_text() == text


def test_records_read_once_serve_page_and_readme_alike(readme, records):
    """What read_records gave may be passed on."""
    found = read_records([*records, BENCHMARK])
    assert update_readme(readme, found) == ["demo", "load-memory"]


def rows(record):
    return [[cell.inline() for cell in row] for row in benchmark_table(record).rows]


def test_benchmark_bytes_print_in_gib_with_their_range():
    """3 GiB, between 1 and 4; a time with its unit; a promise kept."""
    assert benchmark_table(BENCHMARK).columns == ["peak (GiB)", "load (s)", "kept"]
    assert rows(BENCHMARK) == [["3.00 [1.00–4.00]", "12.3", "yes"]]
    assert benchmark_table(BENCHMARK).notes[1:] == ["Machine: cpu: Example CPU; cores: 2."]


def test_a_list_of_rows_is_a_table_of_its_own(tmp_path):
    """One column per key, read from a result file."""
    result = [{"batch": 1, "overhead_percent": 4.25}, {"batch": 8, "overhead_percent": 2.5}]
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"benchmark": "decode-overhead", "result": result}))
    (table,) = benchmark_tables(read_records(path))
    assert table.columns == ["batch", "overhead (%)"]
    assert [[cell.text for cell in row] for row in table.rows] == [["1", "4.25"], ["8", "2.50"]]
