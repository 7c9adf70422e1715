"""The README's table of models against cards is what the planner computes now."""

import json
from pathlib import Path

import pytest

from melinoe.plan.cards import forecast, forecast_record
from melinoe.plan.planner import plan

ROOT = Path(__file__).parents[2]
# The published checkpoints of gpt-oss hold 13.76 and 65.25 GB, of which the backbone is the rest.
GPT_OSS_EXPERTS_GIB = {"gpt-oss-20b": 24 * 32 * 13_236_480, "gpt-oss-120b": 36 * 128 * 13_236_480}


@pytest.fixture(scope="module")
def rows():
    return forecast()


def test_the_committed_record_is_what_is_computed_now(rows):
    """`melinoe plan --cards --out benchmarks/results/plan_cards.json` writes it again."""
    record = json.loads((ROOT / "benchmarks" / "results" / "plan_cards.json").read_text())
    assert record == json.loads(json.dumps(forecast_record(rows)))


def test_a_cell_is_the_plan_of_that_model_on_that_card(rows):
    """Slots and both ends of the speed; None where `melinoe plan` refuses the budget."""
    found = {(row["model"], row["bits"]): row for row in rows}
    alone = plan("OLMoE-1B-7B", card="rtx4060")
    assert found["OLMoE-1B-7B", None]["cards"]["rtx4060"] == {
        "slots": alone.slots,
        "tokens_per_s": [alone.speed_before.low, alone.speed_before.high],
    }
    # One expert of each of 32 layers is 3 x 4096 x 14336 x 2 bytes: 10.5 GiB are more than 8.
    assert found["Mixtral-8x7B", None]["cards"]["rtx4060"] is None


def test_experts_of_gpt_oss_are_counted_as_they_are_packed(rows):
    """13,236,480 bytes each (test_input_13 works that out)."""
    found = {row["model"]: row.get("experts_gib") for row in rows}
    for name, size in GPT_OSS_EXPERTS_GIB.items():
        assert found[name] == pytest.approx(size / 2**30)
