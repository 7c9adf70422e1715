"""
What does a training step with the locality terms cost at real size, in time and in memory?

Bad news would be: fewer tokens a second, or more memory, than transformers with PEFT's low-rank
updates and no terms at all; or terms that take more than 5 % of the step. OLMoE-1B-7B's dimensions
with random weights, trained by each package's own Trainer: routers in full, experts by updates of
the default rank; the model in bfloat16, what is trained in float32. Ways, the first two Melinoe's
own: the default terms; the next-token loss alone; PEFT's ``target_parameters`` on transformers'
Trainer.

Floor: the step's floating-point operations, counted as `benchmarks/losses.py` does, at the rate of
one large bfloat16 product measured here. Each way is run in two rounds, in a process that others
share only while all is well; a way that runs out of memory is reported, and the next one runs. The
first steps of a round are discarded. Random weights route nearly evenly, which is the most experts
a batch can use. Not measured: learning, several devices, recomputed activations.

    python benchmarks/gpu/training.py --out FILE [--layers 16] [--batch 4] [--tokens 1024]
    python benchmarks/gpu/training.py --dry-run     # tiny, on the CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from supervise import Supervisor
from transformers import Trainer, TrainerCallback

from melinoe.config import FinetuneSettings
from melinoe.data import Collator, Encoded
from melinoe.finetune.rates import default_rank
from melinoe.measure import machine, write_json

OURS: dict[str, dict[str, Any]] = {
    "melinoe, default terms": {},
    "melinoe, next-token loss alone": {"lambda_cache": 0.0},
}
PEFT = "transformers and PEFT, next-token loss alone"
ROOF = "roof"
DISCARDED = 3


class Clock(TrainerCallback):
    """Seconds of each optimiser step, and the most memory that any after the first took."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()
        if state.global_step == 1 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self.began)

    def peak_bytes(self) -> int | None:
        """By the allocator's count, everything included; None on the CPU, which has no such."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class PlainTrainer(Trainer):
    """transformers' own, on the same batches in the same order."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def settings_for(arguments: argparse.Namespace, **changes: Any) -> FinetuneSettings:
    return FinetuneSettings(
        steps=arguments.steps, batch_size=arguments.batch, max_length=arguments.tokens,
        log_every=arguments.steps, compute_dtype="bfloat16", lambda_replay=0.0, **changes,
    )  # fmt: skip


def examples(shape: Any, arguments: argparse.Namespace) -> list[Encoded]:
    """Random text, all of it completion."""
    generator = torch.Generator().manual_seed(0)
    size = (arguments.batch * arguments.steps, arguments.tokens)
    ids = torch.randint(1, shape.vocabulary, size, generator=generator).tolist()
    return [Encoded(one, [True] * len(one)) for one in ids]


def train_ours(
    model: Any, shape: Any, arguments: argparse.Namespace, way: str, clock: Clock
) -> None:
    from melinoe.finetune.training import train

    settings = settings_for(arguments, **OURS[way])
    train(model, examples(shape, arguments), settings, pad_token_id=0, callbacks=[clock])


def train_peft(model: Any, shape: Any, arguments: argparse.Namespace, clock: Clock) -> None:
    """Experts by PEFT's updates of the same rank, routers in full, as in Melinoe's runs."""
    from peft import LoraConfig, get_peft_model

    from melinoe.finetune.rates import Rates
    from melinoe.finetune.trainer import set_steps, training_arguments
    from melinoe.moe.routing import find_routers

    settings = settings_for(arguments)
    routers = find_routers(model)
    config = LoraConfig(
        r=default_rank(shape.top_k), lora_alpha=settings.lora_alpha, target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    wrapped = get_peft_model(model, config)
    for router in routers:
        for _, parameter in router.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        trainer_arguments = training_arguments(settings, folder)
        set_steps(trainer_arguments, settings, arguments.steps, Rates.of(routers, settings))
        dataset: Any = examples(shape, arguments)
        PlainTrainer(
            model=wrapped, args=trainer_arguments, train_dataset=dataset,
            data_collator=Collator(0), callbacks=[clock],
        ).train()  # fmt: skip


def run_way(arguments: argparse.Namespace, way: str, tell: Any) -> None:
    """One way, one round: builds the model, trains, tells one row."""
    import shapes

    device = torch.device("cpu") if arguments.dry_run else torch.device("cuda", 0)
    shape = shape_of(arguments)
    if way == ROOF:
        tell("row", section=ROOF, product_flops_per_s=product_rate(arguments, device),
             gpu=None if arguments.dry_run else torch.cuda.get_device_name())  # fmt: skip
        return
    model = shapes.build(shape, device, with_experts=True).requires_grad_(True)
    clock = Clock(device)
    if way == PEFT:
        train_peft(model, shape, arguments, clock)
    else:
        train_ours(model, shape, arguments, way, clock)
    if len(clock.seconds) != arguments.steps:
        raise RuntimeError(f"{len(clock.seconds)} steps were timed of {arguments.steps}")
    tell("row", section="training", way=way, step_s=clock.seconds[DISCARDED:],
         peak_gpu_bytes=clock.peak_bytes())  # fmt: skip


def shape_of(arguments: argparse.Namespace) -> Any:
    import shapes

    if arguments.dry_run:
        return shapes.Shape("OLMoE-1B-7B", 2, 16, 8, 2, 64, 32, 4, 4, 16, 64)
    return shapes.Shape("OLMoE-1B-7B", arguments.layers, 16, 64, 8, 2048, 1024, 16, 16, 128, 50304)


def product_rate(arguments: argparse.Namespace, device: torch.device) -> float:
    """Floating-point operations a second of one large product, the median of some."""
    size = 64 if arguments.dry_run else 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(times[3:])


def step_operations(shape: Any, arguments: argparse.Namespace, rank: int) -> float:
    """Of one step: forward, gradients of inputs, gradients of what is trained."""
    d, f, k = shape.hidden, shape.width, shape.top_k
    attention = 4 * 2 * d * d + 2 * arguments.tokens * d
    experts, head = k * 3 * 2 * d * f, 2 * d * shape.vocabulary
    trained = 2 * d * shape.experts + k * 2 * rank * ((d + 2 * f) + (f + d))
    forward = shape.layers * (attention + experts + trained) + head
    inputs = shape.layers * experts + (shape.layers - 1) * (attention + 2 * arguments.tokens * d)
    tokens = arguments.batch * arguments.tokens
    return float(tokens * (forward + inputs + head + shape.layers * 2 * trained))


def work(arguments: argparse.Namespace) -> None:
    """The worker: each section is ``ROUND: WAY``."""
    with arguments.lines.open("a", encoding="utf-8", buffering=1) as lines:

        def tell(event: str, **more: Any) -> None:
            lines.write(json.dumps({"event": event} | more) + "\n")
            print(json.dumps(more), flush=True)

        for name in arguments.sections:
            tell("begin", section=name)
            begin, failure = time.monotonic(), None
            try:
                run_way(arguments, name.split(": ", 1)[1], tell)
            except Exception as error:
                traceback.print_exc()
                failure = f"{type(error).__name__}: {error}"[:300]
            gc.collect()
            if failure is None:
                tell("end", section=name, seconds=round(time.monotonic() - begin, 1))
            else:
                tell("failed", section=name, reason=failure)
                lines.flush()
                os._exit(3)  # what it holds goes with it
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def record_of(events: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    rows = [event for event in events if event["event"] == "row"]
    roof = next((row for row in rows if row["section"] == ROOF), {})
    shape, tokens = shape_of(arguments), arguments.batch * arguments.tokens
    operations = step_operations(shape, arguments, default_rank(shape.top_k))
    result = []
    for way in (*OURS, PEFT):
        own = [row for row in rows if row.get("way") == way]
        times = [one for row in own for one in row["step_s"]]
        if not times:
            continue
        median = statistics.median(times)
        peaks = [row["peak_gpu_bytes"] for row in own]
        row = {
            "way": way, "tokens_per_s": tokens / median,
            "tokens_per_s_range": [tokens / max(times), tokens / min(times)],
            "step_s": median, "steps": len(times), "rounds": len(own),
            "peak_gpu_bytes": None if None in peaks else max(peaks),
        }  # fmt: skip
        if "product_flops_per_s" in roof:
            row["share_of_floor"] = operations / roof["product_flops_per_s"] / median
        result.append(row)
    by_way = {row["way"]: row["step_s"] for row in result}
    ours, plain, peft = *(by_way.get(way) for way in OURS), by_way.get(PEFT)
    return {
        "benchmark": "gpu_training",
        "title": "A training step at OLMoE-1B-7B's dimensions, beside transformers and PEFT",
        "question": __doc__.strip().splitlines()[0],
        "routing": "random weights: nearly even use of experts",
        "dry_run": arguments.dry_run,
        "shape": {"layers": shape.layers, "batch": arguments.batch, "tokens": arguments.tokens,
                  "rank": default_rank(shape.top_k)},
        "result": result,
        "times_peft": peft / ours if peft and ours else None,
        "terms_share_of_step": 1 - plain / ours if plain and ours else None,
        "roof": {k: v for k, v in roof.items() if k != "event"},
        "not_measured": [
            {"section": e["section"], "reason": e["reason"]}
            for e in events if e["event"] == "failed"
        ],
        "machine": this_machine(),
    }  # fmt: skip


this_machine = cache(machine)


def table(record: dict[str, Any]) -> str:
    lines = []
    for row in record["result"]:
        peak = row["peak_gpu_bytes"]
        lines.append(
            f"{row['way']:46} {row['tokens_per_s']:9.0f} tokens/s  "
            + ("" if peak is None else f"{peak / 2**30:5.1f} GiB  ")
            + f"{row.get('share_of_floor', float('nan')):.0%} of the floor"
        )
    for key, words in (("times_peft", "times PEFT's speed, with all default terms"),
                       ("terms_share_of_step", "of the step are the terms")):  # fmt: skip
        if record[key] is not None:
            lines.append(f"{record[key]:.2f} {words}")
    lines += [f"not measured: {one['section']}: {one['reason']}" for one in record["not_measured"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--sections", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.layers, arguments.batch, arguments.tokens = 2, 2, 8
        arguments.steps, arguments.rounds = DISCARDED + 1, 1
    if arguments.sections:
        work(arguments)
        return
    limit = 600.0 if arguments.dry_run else 100.0
    limits = {f"0: {ROOF}": limit}
    for number in range(1, arguments.rounds + 1):
        limits |= {f"{number}: {way}": limit for way in (*OURS, PEFT)}

    def command(left: Sequence[str], lines: Path) -> list[str]:
        words = [sys.executable, __file__, "--lines", str(lines)]
        for name in ("layers", "batch", "tokens", "steps", "rounds"):
            words += [f"--{name}", str(getattr(arguments, name))]
        return [*words, *["--dry-run"] * arguments.dry_run, "--sections", *left]

    def changed(events: list[dict[str, Any]]) -> None:
        if arguments.out and events[-1]["event"] != "row":
            write_json(arguments.out, record_of(events, arguments))

    with tempfile.TemporaryDirectory() as folder:
        end = time.monotonic() + 60 * arguments.minutes
        events = Supervisor(limits, command, changed, end, Path(folder)).run()
    record = record_of(events, arguments)
    if arguments.out:
        write_json(arguments.out, record)
    print(table(record))
    print(json.dumps(record))


if __name__ == "__main__":
    main()
