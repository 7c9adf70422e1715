"""Forecast a fine-tuning within a budget, from a model's config and a machine's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from melinoe.config import FinetuneSettings
from melinoe.errors import BudgetError
from melinoe.finetune.memory import Plan, plan_run
from melinoe.host_memory import parse_bytes
from melinoe.plan.cards import CARDS
from melinoe.plan.facts import built_from_config, top_k_in
from melinoe.plan.hardware import Bandwidth, find_bandwidth, find_card
from melinoe.plan.planner import gpu_memory_of


@dataclass(frozen=True)
class FinetunePlan:
    """A run within a budget."""

    model: str  # as it was asked for
    plan: Plan  # its memory, and where the experts wait
    rate: Bandwidth  # of what experts are read from
    reads_bytes: int  # of a step, if its tokens use every expert
    # Seconds that those reads take: no step is shorter, and it is as long where the link, not
    # computing, is the bound. Fewer experts used are fewer reads.
    step_s: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"bytes": self.plan.memory.total}


def plan_finetuning(
    model: str,
    settings: FinetuneSettings,
    *,
    gpu_memory: str | int | None = None,
    card: str | None = None,
    ram: str | int | None = None,
    link: str | None = None,
    disk: str | None = None,
) -> FinetunePlan:
    """
    Say whether a fine-tuning of *model*, as `model_facts` takes it, fits, and what its reads take.

    Args:
        settings: Of the run; a pass has ``batch_size`` times ``max_length`` tokens.
        gpu_memory: Of the GPU; absent: nine tenths of *card*'s, or no GPU where there is none.
        ram: What experts may take of the host; without a GPU, what the run may take.
        link, disk: Rates, as `find_bandwidth` takes them; absent: the card's link; ``nvme4``.

    Raises:
        BudgetError: it does not fit; the sentence names the smallest budget that does.
    """
    config, _, dtype, built, layers = built_from_config(model)
    on_gpu = gpu_memory is not None or card is not None
    found = find_card(card) if card is not None else None
    if gpu_memory is not None:
        budget = gpu_memory_of(gpu_memory, card)
    elif found is not None:
        budget = found.memory_bytes * 9 // 10
    else:
        budget = parse_bytes(ram) if ram is not None else 1 << 62
    experts = sum(layer.num_experts * layer.block_bytes for layer in layers)
    host = parse_bytes(ram) if ram is not None else 2 * experts + (1 << 40)
    of_experts = {id(p) for one in layers for p in one.module.parameters(recurse=False)}
    backbone = {id(p): p.nbytes for p in built.parameters() if id(p) not in of_experts}
    computed = settings.compute_dtype
    if computed == "auto":
        computed = "bfloat16" if on_gpu and dtype.itemsize == 2 else "float32"
    made = plan_run(
        built,
        layers,
        sum(backbone.values()),
        replace(settings, compute_dtype=computed),
        settings.batch_size * settings.max_length,
        top_k=top_k_in(config),
        budget_bytes=budget,
        host_bytes=host,
        on_gpu=on_gpu,
    )
    wire = link or (found.link if found is not None else "pcie4x16")
    rate = find_bandwidth(disk or "nvme4", "disk")
    if made.store == "pinned":
        rate = find_bandwidth(wire, "link")
    passes = 2 + 2 * (settings.lambda_replay > 0)
    reads = passes * experts * settings.gradient_accumulation
    return FinetunePlan(model, made, rate, reads, rate.seconds(reads))


MODELS = ("OLMoE-1B-7B", "gpt-oss-20b", "Qwen3-30B-A3B", "Mixtral-8x7B")
# One text a step: what a card that is small for its model is asked to do.
ONE_TEXT = FinetuneSettings(batch_size=1, max_length=1024, lora_rank=16, lambda_replay=0.0)


def forecast_record(models: Sequence[str] = MODELS, cards: Sequence[str] = CARDS) -> dict[str, Any]:
    """Plan a fine-tuning of every model on every card, as a record that `melinoe report` shows."""
    result = []
    for model in models:
        row: dict[str, Any] = {"model": model}
        for name in cards:
            gib = find_card(name).memory_bytes >> 30
            try:
                done = plan_finetuning(model, ONE_TEXT, card=name)
            except BudgetError:
                found = "does not fit"
            else:
                found = f"{done.plan.memory.total / 2**30:.1f} GiB, {done.step_s:.2g} s a step"
                if done.plan.host_updates:
                    found += ", updates on the host"
                row["all experts (GiB)"] = f"{done.plan.expert_bytes / 2**30:.0f}"
            row[f"{gib} GB ({name})"] = found
        result.append(row)
    return {
        "benchmark": "finetune_cards",
        "title": "Fine-tuning models on cards, a forecast",
        "result": result,
        "notes": [
            "Forecast by `melinoe plan --finetune --cards` from configs and datasheets, not "
            f"measured: what a step of one text of {ONE_TEXT.max_length:,} tokens takes of the "
            f"card at rank {ONE_TEXT.lora_rank}, and the seconds in which the link moves every "
            "expert twice, below which no step that uses all of them can be. The experts wait in "
            "host memory, which must hold them."
        ],
    }
