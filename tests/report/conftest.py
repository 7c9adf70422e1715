"""Records of a demo run, and the page that they make."""

import pytest
from report_records import demo_records, serve_record


@pytest.fixture
def make_serve():
    """Build one serve record; see `serve_record`."""
    return serve_record


@pytest.fixture
def records():
    """All records of a run, made anew for each test."""
    return demo_records()


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """A report of all kinds of records, written once; its twin lies beside it."""
    from melinoe.report import write_report

    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(demo_records(), out)
    return out
