"""Reading: what is refused, where it was found, and what is passed over with a note."""

import json

import pytest
from data_rows import write

from melinoe.errors import DataError
from melinoe.measure import append_jsonl
from melinoe.report import read_records, render_table, write_report


def write_lines(path, records):
    write(path, *records)
    return path


def test_files_and_records_in_memory_give_the_same_table(records, tmp_path):
    """One .jsonl, one .json list, one directory of both."""
    middle = len(records) // 2
    write_lines(tmp_path / "a.jsonl", records[:middle])
    (tmp_path / "b.json").write_text(json.dumps(records[middle:]))
    expected = render_table(records, "markdown")
    assert render_table([tmp_path / "a.jsonl", tmp_path / "b.json"], "markdown") == expected
    assert render_table(tmp_path, "markdown") == expected


def test_only_a_newline_ends_a_record(records, tmp_path):
    """Tokens may hold Unicode's own line ends, which JSON leaves as they are."""
    path = tmp_path / "runs.jsonl"
    record = {**records[0], "tokens": ["a\u2028b", "c\x85d", "\u2029"]}
    append_jsonl(path, record)
    append_jsonl(path, records[0])
    found = read_records(path)
    assert found.of(records[0]["kind"]) == [record, records[0]]


def test_a_torn_line_is_named_by_file_and_number(records, tmp_path):
    """The second line stops in its middle, as after a full disk."""
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(records[0]) + "\n" + '{"kind": "serve", "mod')
    with pytest.raises(DataError, match=r"runs\.jsonl, line 2: not JSON"):
        read_records(path)


def test_a_malformed_record_leaves_no_report_behind(records, tmp_path):
    """The error comes before anything is written."""
    path = write_lines(tmp_path / "runs.jsonl", [*records, {"kind": "serve", "model": "base"}])
    out = tmp_path / "report.html"
    with pytest.raises(DataError, match=rf"line {len(records) + 1}: the serve record is malformed"):
        write_report(path, out)
    assert [item.name for item in tmp_path.iterdir()] == ["runs.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hit_rate": 0.5}, "serve record is malformed: hit_rate is not an estimate"),
        ({"hit_rate": {"mean": 1, "low": 1}}, "hit_rate is not an estimate"),
        ({"hit_rate": {"mean": 1, "low": 2, "high": 1, "n": 1}}, "low first"),
        ({"hit_rate": {"mean": float("nan"), "low": 1, "high": 1, "n": 1}}, "finite mean"),
        ({"hit_rate": {"mean": 1, "low": 1, "high": 1}}, "a count n"),
        ({"hit_rate": {"mean": 1, "low": 1, "high": 1, "n": 0.5}}, "a count n"),
        ({"num_experts": "32"}, "num_experts is not a whole number"),
        ({"link": {"bandwidth_gb_s": 1}}, "has no 'latency_us'"),
        ({"model": None}, "it has no 'model'"),
    ],
)
def test_a_wrong_field_is_named(make_serve, changes, message):
    """Each fault alone in a record that is right otherwise."""
    with pytest.raises(DataError, match=message):
        read_records([make_serve("base", **changes)])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "must be a JSON object"),
        ({"model": "base"}, "no 'kind'"),
        (
            {"kind": "training", "model": "m", "log": [{"nll": 1.0}]},
            "has no 'step'",
        ),
        (
            {
                "kind": "curve",
                "model": "m",
                "policy": "lru",
                "num_experts": 4,
                "slots": [1, 2],
                "hit_rate": [{"mean": 0, "low": 0, "high": 0, "n": 1}],
            },
            "differ in length",
        ),
    ],
)
def test_a_record_of_wrong_shape_is_refused(record, message, tmp_path):
    """The message names what is wrong; the file's only record is record 1."""
    path = tmp_path / "runs.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(DataError, match=rf"runs\.json, record 1: .*{message}"):
        read_records(path)


def test_an_unknown_kind_is_passed_over_with_a_note(records, tmp_path):
    """Later versions may measure more; the report says what it left out."""
    found = read_records([*records, {"kind": "novel"}, {"kind": "novel"}])
    assert found.notes == ["2 records of unknown kind 'novel' ignored."]
    logs = [record for record in records if record["kind"] == "demo"]
    write_report([*logs, {"kind": "novel"}], tmp_path / "r.html")
    assert "1 record of unknown kind 'novel' ignored." in (tmp_path / "r.html").read_text()


def test_no_records_at_all_is_an_error(tmp_path):
    """An empty file, an empty directory, an empty list, a file that is not there."""
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for source in (tmp_path / "empty.jsonl", tmp_path / "folder", [], tmp_path / "gone.json"):
        with pytest.raises(DataError):
            read_records(source)
