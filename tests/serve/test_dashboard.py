"""What is deployed beside a server asks for metrics that it has."""

import json
import re
from pathlib import Path

from melinoe.serve.metrics import Metrics

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards" / "melinoe.json"
# Made when a server watches its batches.
WATCHED = {"melinoe_running_requests", "melinoe_waiting_requests", "melinoe_resident_experts"}


def test_each_panel_asks_for_metrics_that_exist():
    """Names in the dashboard's expressions are those of the registry, and none is forgotten."""
    exist = set(WATCHED)
    for family in Metrics().registry.collect():
        suffix = {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")
        exist.add(family.name + suffix)
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"melinoe_\w+", target["expr"])
    }
    assert asked == exist
