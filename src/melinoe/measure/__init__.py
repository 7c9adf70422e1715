"""Run one configuration over prompts, count and time; make the records that `report` reads."""

from melinoe.measure.files import append_jsonl, write_json
from melinoe.measure.machine import machine
from melinoe.measure.serve import serve, serve_record, serving, side_by_side
from melinoe.measure.traces import (
    completion_costs,
    curve_record,
    locality_record,
    rates_by_slots,
    reading_record,
    reading_trace,
    trace_records,
)
