"""What the benchmarks share: a median with its range, and one JSON line with machine and commit."""

import json
import statistics
from pathlib import Path
from typing import Any

from melinoe.measure import machine, write_json


def spread(values: list[float]) -> dict[str, float]:
    """The median of *values*, and both ends."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def publish(record: dict[str, Any], out: Path | None) -> None:
    """Print a result as one JSON line, machine, versions and commit with it; write it to *out*."""
    record = {**record, "machine": machine()}
    if out is not None:
        write_json(out, record)
    print(json.dumps(record))
