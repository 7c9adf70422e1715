"""
Run one configuration over prompts, count and time; records that `report` reads.

    machine.py   what this machine and its software are
    files.py     records to JSON and JSON lines, whole or not at all
    serve.py     serve(model, handle, ...) -> a record of kind ``serve``; several side by side
    locality.py  a trace to records of kind ``locality`` and ``curve``
    training.py  a training log to a record of kind ``training``
"""

from melinoe.measure.files import append_jsonl, write_json
from melinoe.measure.locality import completion_counts, curve_record, locality_record
from melinoe.measure.machine import machine
from melinoe.measure.serve import serve, serve_record, serving, side_by_side
from melinoe.measure.training import training_record

__all__ = [
    "append_jsonl",
    "completion_counts",
    "curve_record",
    "locality_record",
    "machine",
    "serve",
    "serve_record",
    "serving",
    "side_by_side",
    "training_record",
    "write_json",
]
