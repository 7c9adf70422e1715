"""A fine-tuning planned from a config: what fits on which card, and what its reads take."""

import json
import re

import pytest

from melinoe.config import FinetuneSettings
from melinoe.errors import BudgetError
from melinoe.plan.finetuning import plan_finetuning

GIB = 2**30
ONE_TEXT = FinetuneSettings(batch_size=1, max_length=1024, lambda_replay=0.0, lora_rank=16)


@pytest.mark.parametrize(
    ("model", "gib"),
    [("OLMoE-1B-7B", 3.5), ("gpt-oss-20b", 8), ("Qwen3-30B-A3B", 8), ("Mixtral-8x7B", 8)],
)
def test_models_larger_than_a_card_are_trained_on_it(model, gib):
    """One text of 1,024 tokens at rank 16; the experts alone are larger than the budget."""
    done = plan_finetuning(model, ONE_TEXT, gpu_memory=f"{gib}GiB")
    assert done.plan.memory.total <= gib * GIB < done.plan.expert_bytes
    assert done.plan.store == "pinned" and done.plan.buffers >= 2


def test_a_step_reads_each_expert_twice_and_with_replay_four_times():
    """OLMoE: 16 layers x 64 experts x 12 MiB, over a link of 25 GB/s."""
    done = plan_finetuning("OLMoE-1B-7B", ONE_TEXT, gpu_memory="8GiB", link="25GB/s")
    experts = 16 * 64 * 12 * 2**20
    assert done.reads_bytes == 2 * experts
    assert done.step_s == pytest.approx(2 * experts / 25e9)
    replayed = FinetuneSettings(batch_size=1, lambda_replay=0.1)
    assert plan_finetuning("OLMoE-1B-7B", replayed, gpu_memory="8GiB").reads_bytes == 4 * experts


def test_experts_that_ram_cannot_hold_are_read_from_disk():
    """12 GiB of experts beside 8 GiB of host memory, and on a machine without a GPU."""
    small = plan_finetuning("OLMoE-1B-7B", ONE_TEXT, gpu_memory="8GiB", ram="8GiB", disk="2GB/s")
    alone = plan_finetuning("OLMoE-1B-7B", ONE_TEXT, ram="5GiB", disk="2GB/s")
    for done in (small, alone):
        assert done.plan.store == "disk"
        assert done.step_s == pytest.approx(done.reads_bytes / 2e9)


def test_updates_that_do_not_fit_on_the_card_are_kept_on_the_host():
    """Qwen3-30B at rank 16: 630 million numbers, of 16 bytes each with their optimiser."""
    done = plan_finetuning("Qwen3-30B-A3B", ONE_TEXT, gpu_memory="8GiB")
    numbers = 48 * 128 * 16 * (2048 + 1536 + 768 + 2048)
    assert done.plan.host_updates == 16 * numbers
    wide = plan_finetuning("Qwen3-30B-A3B", ONE_TEXT, gpu_memory="24GiB")
    assert wide.plan.host_updates == 0


def test_the_smallest_budget_is_named_and_works():
    """The sentence of the refusal gives the amount."""
    with pytest.raises(BudgetError, match="raise --gpu-memory to") as refused:
        plan_finetuning("Mixtral-8x7B", ONE_TEXT, gpu_memory="1GiB")
    least = re.search(r"raise --gpu-memory to (\S+),", str(refused.value))[1]
    done = plan_finetuning("Mixtral-8x7B", ONE_TEXT, gpu_memory=least)
    assert done.plan.memory.total <= done.plan.budget_bytes


def test_the_command_prints_the_plan_and_its_json(melinoe):
    """In two sentences, from the config alone."""
    asked = ("plan", "OLMoE-1B-7B", "--finetune", "--gpu-memory", "8GiB", "--batch", "1")
    code, out, _ = melinoe(*asked)
    assert code == 0
    assert "1 texts of 512 tokens a step: training takes" in out and "h for 1,000 steps" in out
    code, out, _ = melinoe(*asked, "--json")
    assert json.loads(out)["plan"]["store"] == "pinned"
