"""The README's table of models against cards is what the planner computes now."""

import json
from pathlib import Path

import pytest

from melinoe.plan.cards import forecast_record
from melinoe.plan.planner import plan

ROOT = Path(__file__).parents[2]
# The published checkpoints of gpt-oss hold 13.76 and 65.25 GB, of which the backbone is the rest.
GPT_OSS_EXPERTS_GIB = {"gpt-oss-20b": 24 * 32 * 13_236_480, "gpt-oss-120b": 36 * 128 * 13_236_480}


@pytest.fixture(scope="module")
def record():
    return forecast_record()


def test_the_committed_record_is_what_is_computed_now(record):
    """`melinoe plan --cards --out benchmarks/results/plan_cards.json` writes it again."""
    written = json.loads((ROOT / "benchmarks" / "results" / "plan_cards.json").read_text())
    assert written == json.loads(json.dumps(record))


def test_a_cell_is_the_plan_of_that_model_on_that_card(record):
    """Slots and both ends of the speed; or that `melinoe plan` refuses the budget."""
    found = {row["model"]: row["8 GB (rtx4060)"] for row in record["result"]}
    alone = plan("OLMoE-1B-7B", card="rtx4060")
    low, high = alone.speed_before.low, alone.speed_before.high
    assert found["OLMoE-1B-7B"] == f"{alone.slots} of 64, {low:.2g} to {high:.0f} tokens/s"
    # One expert of each of 32 layers is 3 x 4096 x 14336 x 2 bytes: 10.5 GiB are more than 8.
    assert found["Mixtral-8x7B"] == "does not fit"


def test_experts_of_gpt_oss_are_counted_as_they_are_packed(record):
    """13,236,480 bytes each (test_input_13 works that out)."""
    found = {row["model"]: row["all experts (GiB)"] for row in record["result"]}
    for name, size in GPT_OSS_EXPERTS_GIB.items():
        assert found[name] == f"{size / 2**30:.0f}"
