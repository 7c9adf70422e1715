"""24: a report of a long trace takes seconds: its policies are replayed compiled, in one pass."""

import numpy as np
import pytest
from trace_builder import TraceBuilder

from melinoe.cache import simulator
from melinoe.cache.policy import LRU
from melinoe.cache.residency import Residency
from melinoe.errors import DataError
from melinoe.measure import trace_records
from melinoe.report.page import HERE
from melinoe.report.records import read_records


def long_trace(tokens=300, layers=3, experts=16, top_k=4):
    """Four sequences of random choices."""
    rng = np.random.default_rng(0)
    builder = TraceBuilder(layers, experts, top_k)
    for sequence in range(4):
        for token in range(tokens):
            chosen = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)[:, :top_k]
            builder.add_forward(chosen[None], sequence, int(token > 0))
    return builder.trace()


def test_no_default_policy_is_replayed_request_by_request(monkeypatch):
    """Belady too; a policy from a function must be asked, request by request."""

    def slow(*_, **__):
        raise RuntimeError("a request was planned in Python")

    trace = long_trace()
    monkeypatch.setattr(simulator, "COMPILED_FROM", len(trace))  # as a trace of real length is
    for name in ("request", "request_in_parts", "request_with_host"):
        monkeypatch.setattr(Residency, name, slow)
    records = trace_records(trace, "mine")
    assert {one["policy"] for one in records if one["kind"] == "curve"} == {
        "lru", "lfu", "static", "belady",
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="in Python"):
        simulator.simulate(trace, 2, LRU)


def test_static_is_said_to_know_the_trace_that_is_replayed():
    """Its popularity is hindsight here, and a serving engine has none."""
    glossary = (HERE / "glossary.md").read_text().splitlines()
    (said,) = [line for line in glossary if "static" in line.partition(":")[0]]
    assert "of the same trace, so with hindsight" in said and "elsewhere" not in said


@pytest.mark.parametrize(
    ("name", "way"),
    [("real.parquet", "melinoe import-trace {}"), ("trace.safetensors", "name {} itself")],
)
def test_a_table_or_a_directory_of_traces_is_refused_with_the_way(tmp_path, name, way):
    """As real traces are handed on: a table in a directory beside a page of text."""
    path = tmp_path / name
    path.write_bytes(b"")
    (tmp_path / "README.md").write_text("about")
    for source in (tmp_path, path) if name.endswith("parquet") else (tmp_path,):
        with pytest.raises(DataError) as error:
            read_records([source])
        assert way.format(path) in str(error.value)
