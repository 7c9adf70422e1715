"""
Run one configuration over prompts, count and time; make the records that `report` reads.

    serve.py      serve(model, handle, ...) -> a record of kind ``serve``; several side by side
    traces.py     the records of a trace: locality, curves over slots
    reading.py    what a model chooses while it reads given text, as a trace and a record
    reference.py  greedy tokens and log-probabilities, for another engine to be compared with
    machine.py    this machine and its software
    files.py      records to JSON and JSON lines
"""

from melinoe.measure.files import append_jsonl, write_json
from melinoe.measure.machine import machine
from melinoe.measure.reading import reading_record, reading_trace
from melinoe.measure.serve import serve, serve_record, serving, side_by_side
from melinoe.measure.traces import (
    completion_counts,
    curve_record,
    locality_record,
    trace_records,
)

__all__ = [
    "append_jsonl",
    "completion_counts",
    "curve_record",
    "locality_record",
    "machine",
    "reading_record",
    "reading_trace",
    "serve",
    "serve_record",
    "serving",
    "side_by_side",
    "trace_records",
    "write_json",
]
