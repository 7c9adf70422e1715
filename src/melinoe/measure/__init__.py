"""
Run one configuration over prompts, count and time; records that `report` reads.

    machine.py   what this machine and its software are
    files.py     records to JSON and JSON lines, whole or not at all
    serve.py     serve(model, handle, ...) -> a record of kind ``serve``; several side by side
    locality.py  a trace to records of kind ``locality`` and ``curve``
    replays.py   replays of a trace to a table with intervals
    traces.py    a trace to all records that a report shows of one
    usage.py     a trace to a record of kind ``usage``: experts by sequence and layer
    timeline.py  one generation token by token, a record of kind ``timeline``
    link.py      how records name an emulated link
    reading.py   reading_trace: what a model chooses while it reads given text; its record
    reference.py greedy tokens and log-probabilities for another engine's to be compared with
    training.py  a training log to a record of kind ``training``
"""

from melinoe.measure.files import append_jsonl, write_json
from melinoe.measure.locality import completion_counts, curve_record, locality_record
from melinoe.measure.machine import machine
from melinoe.measure.reading import reading_record, reading_trace
from melinoe.measure.replays import replay_record
from melinoe.measure.serve import serve, serve_record, serving, side_by_side
from melinoe.measure.timeline import timeline_record
from melinoe.measure.traces import trace_records
from melinoe.measure.training import training_record
from melinoe.measure.usage import usage_record

__all__ = [
    "append_jsonl",
    "completion_counts",
    "curve_record",
    "locality_record",
    "machine",
    "reading_record",
    "reading_trace",
    "replay_record",
    "serve",
    "serve_record",
    "serving",
    "side_by_side",
    "timeline_record",
    "trace_records",
    "training_record",
    "usage_record",
    "write_json",
]
